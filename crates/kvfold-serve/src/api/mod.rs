//! The routes, and what they share.

mod answer;
mod chat;
mod completions;
mod form;
mod sampling;
mod stream;
mod tokens;

use crate::error::ApiError;
use crate::guard::{self, Guard};
use crate::metrics::Answered;
use crate::model::Served;
use crate::page;
use crate::worker::Worker;
use axum::body::HttpBody;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Names what of a request was ignored.
const IGNORED: HeaderName = HeaderName::from_static("x-ignored-params");

/// Names a request, the client's name if it gave one.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bytes of a body at most.
const BODY: usize = 8 << 20;

/// Time in which a body must be there.
const BODY_TIME: Duration = Duration::from_secs(30);

/// What all routes know.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) served: Arc<Served>,
    pub(crate) worker: Worker,
    pub(crate) guard: Guard,
    /// Nothing new is taken any more.
    pub(crate) draining: AtomicBool,
    pub(crate) version: &'static str,
}

impl App {
    /// Why no requests are taken, if they are not.
    fn unready(&self) -> Option<ApiError> {
        let why = match () {
            () if !self.worker.is_alive() => "the thread that computes has stopped; see the server's log",
            () if self.draining.load(Ordering::Relaxed) => "the server is shutting down; nothing new is taken",
            () => return None,
        };
        Some(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why).code("not_ready"))
    }
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let computing = Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), ready_only));
    Router::new()
        .merge(computing)
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .route("/openapi.json", get(openapi))
        .route("/", get(page::index))
        .route("/page/{name}", get(page::file))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "there is no such route; /openapi.json lists them"))
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route does not take this method; /openapi.json lists them",
            )
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::check))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), account))
        .with_state(app)
}

/// Counts answers, and hands a request's name on.
async fn account(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route =
        request.extensions().get::<MatchedPath>().map_or_else(|| "other".into(), |path| path.as_str().to_owned());
    let id = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    app.worker.metrics.http.get_or_create(&Answered { route, status }).inc();
    let fresh = || HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).ok();
    if let Some(id) = id.or_else(fresh) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn ready_only(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.unready() {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    }
}

/// A body of JSON, not yet parsed.
#[derive(Debug)]
pub(crate) struct Body(Bytes);

impl<S: Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            let message = "the body must be JSON; send it with the header Content-Type: application/json";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let long = || {
            let message = format!("the body is longer than {BODY} bytes, the most that this server takes");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        // One that says so need not be waited for.
        if request.body().size_hint().lower() > BODY as u64 {
            return Err(long());
        }
        let body = Limited::new(request.into_body(), BODY).collect();
        match tokio::time::timeout(BODY_TIME, body).await {
            Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time; send it again")),
            Ok(Ok(body)) => Ok(Self(body.to_bytes())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(long()),
            Ok(Err(error)) => Err(ApiError::invalid(format!("the body cannot be read: {error}"))),
        }
    }
}

/// Reads a body where it holds up nobody: a long text takes seconds to become tokens.
async fn reading<T: Send + 'static>(
    app: &App,
    body: Bytes,
    read: impl FnOnce(&Arc<Served>, &[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let served = Arc::clone(&app.served);
    let read = tokio::task::spawn_blocking(move || read(&served, &body)).await;
    read.map_err(|_| ApiError::internal("the request could not be read; see the server's log"))?
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json")
}

/// What an answer's objects begin with.
#[derive(Clone, Debug)]
struct Head {
    id: String,
    object: &'static str,
    created: i64,
    model: String,
}

impl Head {
    fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let id = format!("{prefix}-{}", uuid::Uuid::new_v4().simple());
        Self { id, object, created: jiff::Timestamp::now().as_second(), model: model.to_owned() }
    }

    fn chunk(&self, choice: Option<Value>) -> Value {
        let Self { id, object, created, model } = self;
        let choices: Vec<Value> = choice.into_iter().collect();
        json!({ "id": id, "object": object, "created": created, "model": model, "choices": choices })
    }

    fn answer(&self, choices: Vec<Value>, usage: Value) -> Value {
        let mut answer = self.chunk(None);
        answer["choices"] = choices.into();
        answer["usage"] = usage;
        answer
    }
}

/// A response that names what of its request was ignored.
fn with_ignored(mut response: Response, ignored: &[String]) -> Response {
    let plain = |name: &String| name.bytes().filter(|byte| byte.is_ascii_graphic()).map(char::from).collect::<String>();
    let mut names = ignored.iter().map(plain).collect::<Vec<_>>().join(",");
    // A client may have made up thousands of them.
    names.truncate(1000);
    if let Ok(value) = HeaderValue::from_str(&names)
        && !names.is_empty()
    {
        response.headers_mut().insert(IGNORED, value);
    }
    response
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model_json(&app.served)] }))
}

async fn model(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::invalid(error.to_string()))?;
    app.served.check_name(Some(&id))?;
    Ok(Json(model_json(&app.served)))
}

fn model_json(served: &Served) -> Value {
    json!({
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "kvfold",
        "max_model_len": served.context,
        "kvfold": { "method": served.dmc.as_ref().map(|dmc| dmc.method.name()), "chat": served.can_chat() },
    })
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.worker.is_alive() {
        true => Json(json!({ "status": "ok" })).into_response(),
        false => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the thread that computes has stopped").into_response(),
    }
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    app.unready().map_or_else(|| Json(json!({ "status": "ready" })).into_response(), ApiError::into_response)
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.worker.metrics.page()).into_response()
}

async fn version(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "version": app.version }))
}

async fn openapi(State(app): State<Arc<App>>) -> Response {
    let document = include_str!("openapi.json").replace("$VERSION", app.version);
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}
