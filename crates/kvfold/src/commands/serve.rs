//! `kvfold serve`: a model behind OpenAI's API.

use crate::cli::ServeArgs;
use crate::error::AppError;
use crate::output;
use kvfold_engine::Engine;
use kvfold_engine::scheduler::Limits;
use kvfold_kernels::FastCpu;
use kvfold_report::format;
use kvfold_serve::{Config, Key, Room, Served, Worker};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;

/// Threads that read requests: bodies of megabytes, now and then.
const READERS: usize = 2;

pub(crate) fn run(args: &ServeArgs) -> Result<(), AppError> {
    let key = key(args)?;
    let address = SocketAddr::new(args.host, args.port);
    if !args.host.is_loopback() && key.is_none() {
        return Err(AppError::Text {
            file: format!("--host {}", args.host),
            reason:
                "can be reached from outside and there is no key; give one with --api-key-file, or leave out --host"
                    .into(),
        });
    }
    let checkpoint = args.model().open()?;
    let served = Served::new(&checkpoint, args.name())?;
    let engine = args.model().engine(&checkpoint);
    drop(checkpoint);
    let limits = Limits { tokens: args.step_tokens as usize, running: args.max_running as usize };
    let memory = match args.kv_memory {
        Some(bytes) => bytes,
        None => available_memory()? / 2,
    };
    let Room { pages, prefixes } = Room::of(&engine, memory, limits.running)
        .map_err(|reason| AppError::Text { file: "--kv-memory".into(), reason })?;
    let engine = engine.with_page_limit(pages);
    let says = says(&engine, memory);
    let worker = Worker::start(engine, (limits, prefixes), args.max_queue as usize, (&served, output::VERSION));
    let worker =
        worker.map_err(|error| AppError::Setup { what: "start the engine's thread", reason: error.to_string() })?;

    let failed = |what| move |error: std::io::Error| AppError::Setup { what, reason: error.to_string() };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(READERS)
        .enable_all()
        .build();
    let ended = runtime.map_err(failed("start the server"))?.block_on(async {
        let listener = TcpListener::bind(address).await.map_err(|error| AppError::Setup {
            what: "listen",
            reason: format!("{address}: {error}; choose another with --host and --port"),
        })?;
        let address = listener.local_addr().map_err(failed("listen"))?;
        // Signals are heard from here on: whoever reads the next line may send one.
        let signals = Signals::listen().map_err(failed("listen for signals"))?;
        output::note(&says);
        output::note(&format!("listening on http://{address}"));
        let config = Config { key, drain: Duration::from_secs(args.drain), version: output::VERSION };
        kvfold_serve::serve(listener, (served, worker), config, signals.stop()).await.map_err(failed("serve"))
    })?;
    if !ended {
        output::note(&format!("not everything had ended after {} seconds; stopped all the same", args.drain));
    }
    Ok(())
}

fn key(args: &ServeArgs) -> Result<Option<Key>, AppError> {
    let Some(path) = &args.api_key_file else { return Ok(None) };
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| AppError::File {
        file: file.clone(),
        action: "read",
        source,
    })?;
    Key::parse(&text).map(Some).map_err(|bad| AppError::Text { file, reason: bad.to_string() })
}

/// What the memory is good for.
fn says(engine: &Engine<FastCpu>, memory: usize) -> String {
    let context = engine.model().shape.context;
    let full = engine.dense_usage(context).bytes().max(1);
    format!(
        "{} cache of {}: {} tokens of context in a full cache take {}, so {} such texts fit, and more where they compress",
        engine.pool().dtype().name(),
        format::bytes(memory as u64),
        context,
        format::bytes(full as u64),
        memory / full,
    )
}

/// Bytes that programs may still take, of the machine or of the control group that this one is confined to.
fn available_memory() -> Result<usize, AppError> {
    let unknown = |error: sysinfo::Error| AppError::Setup {
        what: "find out how much memory is free",
        reason: format!("{error}; say how much the cache may take with --kv-memory"),
    };
    let mut system = sysinfo::System::new().map_err(unknown)?;
    system.refresh_memory();
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Ok(system.available_memory().min(group) as usize)
}

/// Ctrl-C and SIGTERM.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    fn listen() -> std::io::Result<Self> {
        Ok(Self {})
    }

    /// Waits for the first; the second ends the program.
    async fn stop(mut self) {
        self.next().await;
        output::note("stopping: nothing new is taken, what runs may end; once more stops at once");
        tokio::spawn(async move {
            self.next().await;
            std::process::exit(crate::error::INTERRUPTED.into());
        });
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        // Without signals the server runs until it is killed.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
