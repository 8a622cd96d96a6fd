//! `POST /tokenize` and `POST /detokenize`.

use super::{App, Body, reading, with_ignored};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::{Served, chat_of};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Tokens of a text or of a chat.
pub(super) async fn tokenize(State(app): State<Arc<App>>, Body(body): Body) -> Result<Response, ApiError> {
    let (answer, ignored) = reading(&app, body, tokens_of).await?;
    Ok(with_ignored(Json(answer).into_response(), &ignored))
}

fn tokens_of(served: &Arc<Served>, body: &[u8]) -> Result<(Value, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    served.check_name(fields.take::<String>("model")?.as_deref())?;
    let messages: Option<Vec<Map<String, Value>>> = fields.take("messages")?;
    let tokens = match messages {
        Some(messages) => {
            let variables = fields.take("chat_template_kwargs")?.unwrap_or_default();
            let mut chat = chat_of(messages, fields.take("tools")?, variables)?;
            chat.add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(true);
            served.encode(&served.render(&chat)?, false)?
        }
        None => {
            let text: String = fields.need("prompt")?;
            served.encode(&text, fields.take("add_special_tokens")?.unwrap_or(true))?
        }
    };
    let mut answer = json!({ "count": tokens.len(), "max_model_len": served.context });
    if fields.take("return_token_strs")?.unwrap_or(false) {
        answer["token_strs"] = tokens.iter().map(|&token| served.token_text(token)).collect();
    }
    answer["tokens"] = json!(tokens);
    Ok((answer, fields.finish(&[])?))
}

/// Text of tokens.
pub(super) async fn detokenize(State(app): State<Arc<App>>, Body(body): Body) -> Result<Response, ApiError> {
    let (answer, ignored) = reading(&app, body, text_of).await?;
    Ok(with_ignored(Json(answer).into_response(), &ignored))
}

fn text_of(served: &Arc<Served>, body: &[u8]) -> Result<(Value, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    served.check_name(fields.take::<String>("model")?.as_deref())?;
    let tokens: Vec<u32> = fields.need("tokens")?;
    served.check_tokens(&tokens, "tokens")?;
    Ok((json!({ "prompt": served.decode(&tokens, false)? }), fields.finish(&[])?))
}
