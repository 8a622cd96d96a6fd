//! An OpenAI-compatible server over the engine.
//!
//! One thread computes ([`Worker`]); the rest is asynchronous and only waits. A request becomes one job per choice; each
//! has a ticket, and dropping a ticket cancels its job, so whatever ends a request early, a client that went away
//! included, frees its pages within a step. What the server honours is in `docs/server.md`.

mod api;
mod error;
mod fields;
mod grammar;
mod guard;
mod metrics;
mod model;
mod page;
#[cfg(test)]
mod tests;
mod text;
mod tools;
mod worker;

pub use guard::{BadKey, Key};
pub use model::Served;
pub use worker::{Room, Worker};

use api::App;
use guard::Guard;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Time in which a request's headers must be there.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Headers of a request at most, and bytes of all of them.
const HEADERS: usize = 64;
const HEADER_BYTES: usize = 64 << 10;

/// Connections at the same time at most; others wait to be accepted.
const CONNECTIONS: usize = 2048;

/// How long to wait after a connection that could not be accepted: for lack of file handles, mostly.
const PAUSE: Duration = Duration::from_millis(50);

/// How to serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// The key that clients need, if any.
    pub key: Option<Key>,
    /// Time that running requests have to end once the server is asked to stop.
    pub drain: Duration,
    /// This build, for `/version`.
    pub version: &'static str,
}

/// Serves a model until `stop` is done, and then lets what runs come to its end. Whether all of it did.
pub async fn serve(
    listener: TcpListener,
    (served, worker): (Served, Worker),
    config: Config,
    stop: impl Future<Output = ()>,
) -> io::Result<bool> {
    let Config { key, drain, version } = config;
    let guard = Guard { key };
    let app = Arc::new(App { served: Arc::new(served), worker, guard, draining: AtomicBool::new(false), version });
    let router = api::router(Arc::clone(&app));
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_headers(HEADERS).max_buf_size(HEADER_BYTES);
    let mut stop = std::pin::pin!(stop);
    loop {
        let (stream, place) = tokio::select! {
            () = &mut stop => break,
            accepted = accept(&listener, &connections) => match accepted {
                Ok(accepted) => accepted,
                // Of this connection, or of too many open files, which will be fewer.
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        // Tokens are small and should not wait for more.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // A connection that broke is its client's affair.
            let _ = connection.await;
            drop(place);
        });
    }
    app.draining.store(true, Ordering::Relaxed);
    drop(listener);
    Ok(tokio::time::timeout(drain, graceful.shutdown()).await.is_ok())
}

/// A connection, and its place among them.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> io::Result<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(connections).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}
