//! Answers as they grow: server-sent events in OpenAI's order.

use super::answer::{Usage, failed, live_json, trace_json};
use super::sampling::Sampling;
use super::{App, Head};
use crate::error::ApiError;
use crate::worker::{End, Ticket, Update};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Silence after which a comment is sent, so that nobody in between takes the connection for dead.
const PING: Duration = Duration::from_secs(15);

/// Chunks that may wait for a slow client.
const AHEAD: usize = 64;

/// What differs between chats and completions: the choices of a chunk.
pub(super) trait Teller: Send + 'static {
    /// Before anything is computed; none if nothing is to be said.
    fn begin(&mut self, choice: usize) -> Option<Value>;
    /// Of an update other than the end.
    fn tell(&mut self, choice: usize, update: &Update) -> Option<Value>;
    /// Of the end.
    fn end(&mut self, choice: usize, end: &End) -> Vec<Value>;
}

/// Sends an answer as it grows.
pub(super) fn answer(
    app: Arc<App>,
    head: Head,
    (sampling, usage): (&Sampling, Usage),
    tickets: Vec<Ticket>,
    teller: impl Teller,
) -> Response {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let writer = Writer {
        app,
        head,
        include_usage: sampling.include_usage || sampling.continuous_usage,
        continuous: sampling.continuous_usage,
        choices: sampling.n,
        usage,
        sender,
    };
    tokio::spawn(writer.write(tickets, teller));
    let events = stream::unfold(receiver, |mut receiver| async move {
        let data: String = receiver.recv().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), receiver))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(PING)).into_response()
}

/// Nobody listens any more.
struct Gone;

struct Writer {
    app: Arc<App>,
    head: Head,
    include_usage: bool,
    continuous: bool,
    /// Choices for each prompt.
    choices: usize,
    usage: Usage,
    sender: mpsc::Sender<String>,
}

impl Writer {
    /// Tells all choices as they grow. Dropping the tickets, when nobody listens any more, cancels what is not done.
    async fn write(mut self, tickets: Vec<Ticket>, mut teller: impl Teller) {
        let gone = self.sender.clone();
        tokio::select! {
            _ = self.tell(tickets, &mut teller) => {}
            () = gone.closed() => {}
        }
    }

    async fn tell(&mut self, tickets: Vec<Ticket>, teller: &mut impl Teller) -> Result<(), Gone> {
        for n in 0..tickets.len() {
            if let Some(choice) = teller.begin(n) {
                self.chunk(Some(choice), None, None).await?;
            }
        }
        let updates = |(n, ticket): (usize, Ticket)| {
            stream::unfold(ticket, move |mut ticket| async move {
                let update = ticket.next().await?;
                Some(((n, update), ticket))
            })
            .boxed()
        };
        let mut left = tickets.len();
        let mut new = vec![0; left];
        let mut all = stream::select_all(tickets.into_iter().enumerate().map(updates));
        let mut trace = None;
        while left > 0 {
            let Some((n, update)) = all.next().await else {
                return self.fail(&ApiError::internal("the thread that computes has stopped")).await;
            };
            match update {
                Update::Failed(reason) => return self.fail(&failed(&reason)).await,
                Update::End(end) => {
                    left -= 1;
                    for choice in teller.end(n, &end) {
                        self.chunk(Some(choice), None, Some(&new)).await?;
                    }
                    self.usage.add(&end, n.is_multiple_of(self.choices));
                    new[n] = 0;
                    trace = end.trace;
                }
                update => {
                    let choice = teller.tell(n, &update);
                    let mut cache = None;
                    if let Update::Text { tokens, cache: held, .. } = update {
                        new[n] = tokens;
                        cache = held;
                    }
                    if choice.is_some() || cache.is_some() {
                        let live = cache.map(|cache| live_json(&cache));
                        self.chunk(choice, live, Some(&new)).await?;
                    }
                }
            }
        }
        if let Some(trace) = trace {
            let trace = trace_json(&self.app.served, &trace);
            self.chunk(None, Some(json!({ "trace": trace })), None).await?;
        }
        if self.include_usage {
            let mut chunk = self.head.chunk(None);
            chunk["usage"] = self.usage.json();
            self.send(&chunk).await?;
        }
        self.sender.send("[DONE]".into()).await.map_err(|_| Gone)
    }

    /// One chunk; `new` are tokens of choices that are not done.
    async fn chunk(&self, choice: Option<Value>, live: Option<Value>, new: Option<&[usize]>) -> Result<(), Gone> {
        let mut chunk = self.head.chunk(choice);
        if self.include_usage {
            chunk["usage"] = match new.filter(|_| self.continuous) {
                None => Value::Null,
                Some(new) => self.usage.with_new(new.iter().sum()).json(),
            };
        }
        if let Some(live) = live {
            chunk["kvfold"] = live;
        }
        self.send(&chunk).await
    }

    async fn fail(&self, error: &ApiError) -> Result<(), Gone> {
        self.send(&error.body()).await
    }

    async fn send(&self, chunk: &Value) -> Result<(), Gone> {
        self.sender.send(chunk.to_string()).await.map_err(|_| Gone)
    }
}
