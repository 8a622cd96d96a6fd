//! The thread that computes: requests come in by a channel, what becomes of them goes out by one per request.
//!
//! Tokens become text here, so that a stop string ends a request in the step in which it is complete, and what a request
//! cost does not depend on how fast anybody listens.

use crate::metrics::Metrics;
use crate::model::Served;
use crate::text::{Piece, Text};
use kvfold_cache::Held;
use kvfold_engine::scheduler::{Id, Limits};
use kvfold_engine::{
    Batcher, Engine, EngineError, Event, LogProbs, PrefixSettings, PrefixStats, Request, Sequence, Trace,
};
use kvfold_kernels::CacheOps;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// What the cache holds for one text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CacheUse {
    /// Whether it could compress.
    pub(crate) engaged: bool,
    pub(crate) held: Option<Held>,
    pub(crate) bytes: usize,
    pub(crate) dense_bytes: usize,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Stop,
    Length,
}

/// A text's end.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) reason: Reason,
    /// New tokens, the one that ended the text and those of a stop string included.
    pub(crate) tokens: usize,
    /// Tokens of the prompt that were not computed, since the cache had them.
    pub(crate) cached: usize,
    pub(crate) cache: CacheUse,
    pub(crate) trace: Option<Traced>,
}

/// Tokens that a cache has taken, and what was decided on them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Traced {
    pub(crate) tokens: Vec<u32>,
    pub(crate) trace: Trace,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Update {
    /// Probabilities of its prompt's tokens, from the second on.
    Prompt(Vec<LogProbs>),
    /// More of its text, its tokens so far, and, where that is wanted, what the cache holds.
    Text { piece: Piece, tokens: usize, cache: Option<CacheUse> },
    /// It is over.
    End(End),
    /// It is over, and there is no answer.
    Failed(String),
}

/// A place among the requests that run or wait, free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request on its way in.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) text: Text,
    /// Whether each update says what the cache holds.
    pub(crate) live: bool,
}

#[derive(Debug)]
enum Command {
    Submit { jobs: Vec<(Job, Seat)>, tickets: oneshot::Sender<Result<Vec<Ticket>, EngineError>> },
    Cancel(Id),
}

/// A request that was taken. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: Id,
    commands: Sender<Command>,
    updates: mpsc::UnboundedReceiver<Update>,
    _seat: Seat,
}

impl Ticket {
    /// What happens next; none when all was said, or the thread is gone.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.updates.recv().await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // A thread that is gone holds nothing.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

/// Why jobs were not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{live} requests run or wait, as many as this server takes; try again soon")]
    Busy { live: usize },
    #[error("the thread that computes has stopped; see the server's log")]
    Dead,
}

/// The engine's thread.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    live: Arc<AtomicUsize>,
    most: usize,
    /// Tokens of a text that the cache takes even if nothing folds.
    pub(crate) capacity: usize,
    pub(crate) metrics: Arc<Metrics>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts a thread that serves an engine, and keeps so many beginnings of texts. At most `queue` requests wait beside those
    /// that run.
    pub fn start<O: CacheOps + Send + 'static>(
        engine: Engine<O>,
        (limits, prefixes): (Limits, usize),
        queue: usize,
        (served, version): (&Served, &str),
    ) -> std::io::Result<Self>
    where
        O::Arena: Send,
        O::Tensor: Send,
    {
        let (commands, received) = std::sync::mpsc::channel();
        let about = vec![
            ("model", served.name.clone()),
            ("version", version.to_owned()),
            ("method", engine.policy().name().to_owned()),
            ("cache", engine.pool().dtype().name().to_owned()),
        ];
        let metrics = Arc::new(Metrics::new(&served.name, about));
        let live: Arc<AtomicUsize> = Arc::default();
        // Texts are thought to fold as far as the model was taught to, until they show what they do.
        let context = (Arc::clone(&metrics), commands.clone(), 1.0 / served.ratio);
        let capacity = capacity(&engine);
        let thread = std::thread::Builder::new().name("kvfold-engine".into()).spawn(move || {
            let mut engine = engine;
            work(&mut engine, (limits, prefixes), &received, context);
        })?;
        Ok(Self { commands, live, most: limits.running.saturating_add(queue), capacity, metrics, thread })
    }

    /// Whether the thread runs.
    pub(crate) fn is_alive(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Hands over requests: all of them are taken, or none.
    pub(crate) async fn submit(&self, jobs: Vec<Job>) -> Result<Vec<Ticket>, Refused> {
        let count = jobs.len();
        let room = |live: usize| (live + count <= self.most).then_some(live + count);
        self.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).map_err(|live| Refused::Busy { live })?;
        let jobs = jobs.into_iter().map(|job| (job, Seat(Arc::clone(&self.live)))).collect();
        let (tickets, answer) = oneshot::channel();
        self.commands.send(Command::Submit { jobs, tickets }).map_err(|_| Refused::Dead)?;
        Ok(answer.await.map_err(|_| Refused::Dead)??)
    }
}

/// What a cache of some bytes has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Pages of all texts together.
    pub pages: usize,
    /// Beginnings of texts that are kept at most.
    pub prefixes: usize,
}

impl Room {
    /// The room in `bytes` for `running` sequences. What their open states take, and those of kept beginnings, is set aside, so
    /// all that the cache can come to hold is within these bytes. An error if not even a short text fits.
    pub fn of<O: CacheOps>(engine: &Engine<O>, bytes: usize, running: usize) -> Result<Self, String> {
        let heads = engine.model().shape.layers * engine.model().shape.heads.kv;
        let state = heads * engine.usage(&engine.sequence()).state_bytes;
        let prefixes = (bytes / PREFIX_SHARE / state.max(1)).min(PrefixSettings::default().most);
        let pages = bytes.saturating_sub(state * (running + prefixes)) / page_bytes(engine);
        let least = engine.pool().worst_pages(SHORT);
        if pages >= least {
            return Ok(Self { pages, prefixes });
        }
        let needed =
            (state * running + least * page_bytes(engine)).saturating_mul(PREFIX_SHARE).div_ceil(PREFIX_SHARE - 1);
        Err(format!(
            "{bytes} bytes are too few: a text of {SHORT} tokens beside the states of {running} requests needs {needed}"
        ))
    }
}

/// One part in so many is for the open states of kept beginnings, at most.
const PREFIX_SHARE: usize = 20;

/// Tokens of a text that a server should have room for.
const SHORT: usize = 64;

/// Tokens of a text that an engine takes to its end whatever they do.
fn capacity<O: CacheOps>(engine: &Engine<O>) -> usize {
    let pool = engine.pool();
    let (mut low, mut high) = (0, engine.model().shape.context);
    while low < high {
        let middle = (low + high).div_ceil(2);
        match pool.worst_pages(middle) <= pool.limit() {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    low
}

/// A request that the thread knows.
struct Live {
    text: Text,
    updates: mpsc::UnboundedSender<Update>,
    live: bool,
    /// Whether it may compress.
    engaged: bool,
    /// Tokens that its cache will take, if they are to be told.
    told: Option<Vec<u32>>,
    tokens: usize,
    began: Instant,
    running: bool,
    last_token: Option<Instant>,
}

struct Desk<'e, O: CacheOps> {
    batcher: Batcher<'e, O>,
    live: BTreeMap<Id, Live>,
    metrics: Arc<Metrics>,
    commands: Sender<Command>,
    preemptions: u64,
    prefixes: PrefixStats,
    /// When the caches of all that runs were last summed up.
    walked: Option<Instant>,
}

/// Sums over all caches are this old at most while something runs.
const FRESH: Duration = Duration::from_millis(100);

fn work<O: CacheOps>(
    engine: &mut Engine<O>,
    (limits, prefixes): (Limits, usize),
    received: &Receiver<Command>,
    (metrics, commands, share): (Arc<Metrics>, Sender<Command>, f64),
) {
    let (page, limit) = (page_bytes(engine), engine.pool().limit());
    metrics.pages_limit.set(limit.try_into().unwrap_or(i64::MAX));
    metrics.bytes_limit.set(limit.saturating_mul(page).try_into().unwrap_or(i64::MAX));
    let settings = PrefixSettings { most: prefixes, ..PrefixSettings::default() };
    let batcher = Batcher::new(engine, limits, share).with_prefixes(settings);
    let (live, prefixes) = (BTreeMap::new(), PrefixStats::default());
    let mut desk = Desk { batcher, live, metrics, commands, preemptions: 0, prefixes, walked: None };
    desk.gauge();
    loop {
        let idle = desk.batcher.is_idle();
        let command = match idle {
            true => received.recv().map_err(|_| TryRecvError::Disconnected),
            false => received.try_recv(),
        };
        match command {
            Ok(command) => desk.carry_out(command),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => desk.step(),
        }
        desk.gauge();
    }
}

/// Bytes of the larger kind of page.
fn page_bytes<O: CacheOps>(engine: &Engine<O>) -> usize {
    let usage = engine.usage(&engine.sequence());
    usage.page_bytes.max(usage.ring_page_bytes)
}

impl<O: CacheOps> Desk<'_, O> {
    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Cancel(id) => self.cancel(id),
            Command::Submit { jobs, tickets } => {
                // If nobody waits for the tickets any more, dropping them cancels.
                let _ = tickets.send(jobs.into_iter().map(|(job, seat)| self.take(job, seat)).collect());
            }
        }
    }

    fn take(&mut self, job: Job, seat: Seat) -> Result<Ticket, EngineError> {
        let Job { request, text, live } = job;
        let engaged = !request.kind.full && self.batcher.engine().model().dmc.is_some();
        let told = request.kind.trace.then(|| request.prompt.clone());
        let prompt = request.prompt.len() as u64;
        let id = self.batcher.submit(request)?;
        self.metrics.prompt_tokens.inc_by(prompt);
        let (updates, receiver) = mpsc::unbounded_channel();
        let began = Instant::now();
        let known = Live { text, updates, live, engaged, told, tokens: 0, began, running: false, last_token: None };
        self.live.insert(id, known);
        Ok(Ticket { id, commands: self.commands.clone(), updates: receiver, _seat: seat })
    }

    /// Nobody listens any more, or all was said.
    fn cancel(&mut self, id: Id) {
        if self.live.remove(&id).is_some() {
            drop(self.batcher.cancel(id));
            self.metrics.ended("cancelled");
        }
    }

    fn step(&mut self) {
        match self.batcher.step() {
            Ok(events) => events.into_iter().for_each(|event| self.pass_on(event)),
            Err(error) => panic!("a step that was planned failed: {error}"),
        }
        let now = Instant::now();
        for (id, live) in self.live.iter_mut().filter(|(_, live)| !live.running) {
            if self.batcher.sequence(*id).is_some() {
                live.running = true;
                self.metrics.queue_seconds.observe((now - live.began).as_secs_f64());
            }
        }
    }

    fn pass_on(&mut self, event: Event) {
        match event {
            Event::Prompt { id, log_probs } => self.say(id, Update::Prompt(log_probs)),
            Event::Failed { id, reason } => {
                self.say(id, Update::Failed(reason));
                self.live.remove(&id);
                self.metrics.ended("error");
            }
            Event::Token { id, token, log_probs } => self.token(id, token, log_probs),
            Event::Finished { id, stopped, stop, cached, sequence } => {
                if let Some((live, (token, log_probs))) = self.live.get_mut(&id).zip(stop) {
                    live.tokens += 1;
                    live.text.end(token, log_probs);
                }
                self.end(id, if stopped { Reason::Stop } else { Reason::Length }, (&sequence, cached));
            }
        }
    }

    fn token(&mut self, id: Id, token: u32, log_probs: Option<LogProbs>) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let now = Instant::now();
        match live.last_token.replace(now) {
            None => self.metrics.first_token.observe((now - live.began).as_secs_f64()),
            Some(last) => self.metrics.inter_token.observe((now - last).as_secs_f64()),
        }
        self.metrics.generation_tokens.inc();
        live.tokens += 1;
        live.told.iter_mut().for_each(|told| told.push(token));
        let (piece, stopped) = match live.text.push(token, log_probs) {
            Ok(shown) => shown,
            Err(error) => {
                let reason = error.to_string();
                drop(self.batcher.cancel(id));
                return self.pass_on(Event::Failed { id, reason });
            }
        };
        let (tokens, engaged) = (live.tokens, live.engaged);
        let sequence = self.batcher.sequence(id);
        let cache = sequence.filter(|_| live.live).map(|sequence| self.cache(sequence, engaged));
        self.say(id, Update::Text { piece, tokens, cache });
        let cached = self.batcher.cached(id);
        if stopped && let Some(sequence) = self.batcher.cancel(id) {
            self.end(id, Reason::Stop, (&sequence, cached));
        }
    }

    fn end(&mut self, id: Id, reason: Reason, (sequence, cached): (&Sequence, usize)) {
        let Some(mut live) = self.live.remove(&id) else { return };
        let cache = self.cache(sequence, live.engaged);
        // After a stop string there is nothing left to be said.
        let piece = live.text.finish().unwrap_or_default();
        if piece != Piece::default() || live.live {
            let cache = live.live.then(|| cache.clone());
            let _ = live.updates.send(Update::Text { piece, tokens: live.tokens, cache });
        }
        let traced = |tokens: Vec<u32>| {
            let tokens = tokens[..sequence.tokens().min(tokens.len())].to_vec();
            sequence.trace().map(|trace| Traced { tokens, trace: trace.clone() })
        };
        if let Some(held) = &cache.held {
            self.metrics.tokens_seen.inc_by(held.tokens as f64);
            self.metrics.slots_held.inc_by(held.tokens as f64 / held.logical_ratio());
        }
        self.metrics.request_seconds.observe(live.began.elapsed().as_secs_f64());
        self.metrics.ended(match reason {
            Reason::Stop => "stop",
            Reason::Length => "length",
        });
        let trace = live.told.take().and_then(traced);
        let _ = live.updates.send(Update::End(End { reason, tokens: live.tokens, cached, cache, trace }));
    }

    /// Says something to whoever listens to a request. If nobody does any more, their ticket's end is on its way.
    fn say(&self, id: Id, update: Update) {
        if let Some(live) = self.live.get(&id) {
            let _ = live.updates.send(update);
        }
    }

    fn cache(&self, sequence: &Sequence, engaged: bool) -> CacheUse {
        let engine = self.batcher.engine();
        CacheUse {
            engaged,
            held: Some(sequence.held()),
            bytes: engine.usage(sequence).bytes(),
            dense_bytes: engine.dense_usage(sequence.tokens()).bytes(),
        }
    }

    fn gauge(&mut self) {
        let (engine, scheduler, metrics) = (self.batcher.engine(), self.batcher.scheduler(), &self.metrics);
        // Those of kept prefixes are there for whoever needs them.
        let (held, limit) = (engine.pool().pages_in_use(), engine.pool().limit());
        metrics.running.set(scheduler.running() as i64);
        metrics.waiting.set(scheduler.waiting() as i64);
        metrics.pages_held.set(held as i64);
        metrics.page_usage.set(held as f64 / limit as f64);
        metrics.predicted_share.set(scheduler.predicted_share());
        let preemptions = self.batcher.preemptions();
        metrics.preemptions.inc_by(preemptions - self.preemptions);
        self.preemptions = preemptions;
        let PrefixStats { queried, hit } = self.batcher.prefix_stats();
        metrics.prefix_tokens.inc_by(queried - self.prefixes.queried);
        metrics.prefix_hit_tokens.inc_by(hit - self.prefixes.hit);
        self.prefixes = PrefixStats { queried, hit };
        let fresh = self.walked.is_some_and(|walked| walked.elapsed() < FRESH);
        if fresh && !self.batcher.is_idle() {
            return;
        }
        self.walked = Some(Instant::now());
        let (mut bytes, mut dense, mut seen, mut slots) = (0, 0, 0, 0);
        for sequence in self.live.keys().filter_map(|&id| self.batcher.sequence(id)) {
            bytes += engine.usage(sequence).bytes();
            dense += engine.dense_usage(sequence.tokens()).bytes();
            let Held { tokens, slots: heads } = sequence.held();
            seen += tokens * heads.iter().map(Vec::len).sum::<usize>();
            slots += heads.iter().flatten().sum::<usize>();
        }
        let ratio = |many: usize, few: usize| if few == 0 { 1.0 } else { many as f64 / few as f64 };
        metrics.bytes_held.set(bytes as i64);
        metrics.bytes_dense.set(dense as i64);
        metrics.logical_ratio.set(ratio(seen, slots));
        metrics.physical_ratio.set(ratio(dense, bytes));
    }
}
