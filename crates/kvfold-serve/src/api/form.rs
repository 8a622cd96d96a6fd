//! The way of a request that computes, the same for chats and for completions.

use super::answer::{Asked, Choice, Usage};
use super::stream::{self, Teller};
use super::{App, Head, reading, with_ignored};
use crate::error::ApiError;
use crate::model::Served;
use axum::Json;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::Value;
use std::sync::Arc;

/// A request, read.
pub(super) struct Read<F> {
    pub(super) asked: Asked,
    pub(super) form: F,
    /// Fields that mean nothing here.
    pub(super) ignored: Vec<String>,
}

/// What differs between chats and completions: how a request is read, and what is told of the answer.
pub(super) trait Form: Sized + Send + 'static {
    /// Tells the answer as it grows.
    type Teller: Teller;

    fn read(served: &Arc<Served>, body: &[u8]) -> Result<Read<Self>, ApiError>;

    /// What the answer, or each chunk of it, begins with.
    fn head(model: &str, stream: bool) -> Head;

    /// The answer in one piece.
    fn whole(&self, head: Head, usage: Usage, choices: Vec<Choice>) -> Value;

    /// The answer of so many choices as it grows.
    fn teller(self, choices: usize) -> Self::Teller;
}

/// Answers a request.
pub(super) async fn answer<F: Form>(app: Arc<App>, body: Bytes) -> Result<Response, ApiError> {
    let Read { asked, form, ignored } = reading(&app, body, F::read).await?;
    let (usage, sampling) = (Usage::of_prompts(&asked.prompts), asked.sampling.clone());
    let head = F::head(&app.served.name, sampling.stream);
    let tickets = asked.submit(&app).await?;
    let response = match sampling.stream {
        true => {
            let teller = form.teller(tickets.len());
            stream::answer(app, head, (&sampling, usage), tickets, teller)
        }
        false => Json(form.whole(head, usage, Choice::all(tickets).await?)).into_response(),
    };
    Ok(with_ignored(response, &ignored))
}
