//! Many requests on one engine: continuous batching, step by step.
//!
//! A request waits, runs, and ends; each step computes one pass over whoever the [`Scheduler`] chose, prompts in chunks
//! beside those that decode. It ends by itself, or is cancelled at any moment, and its pages are free for the next step.
//! Beginnings of texts may be kept for requests that begin so (`prefixes.rs`).

mod prefixes;

pub use prefixes::{PrefixSettings, PrefixStats};

use crate::engine::{Engine, EngineError, Sequence};
use crate::generate::{Options, ensure_fits};
use crate::sampler::{LogProbs, Place};
use crate::scheduler::{HeadStart, Id, Limits, Memory, Plan, Scheduler};
use kvfold_cache::SequenceCache;
use kvfold_kernels::CacheOps;
use std::collections::BTreeMap;

/// A text to continue.
#[derive(Clone, Debug)]
pub struct Request {
    /// Tokens to begin with, at least one.
    pub prompt: Vec<u32>,
    /// How to decode.
    pub options: Options,
    /// Of draws with one seed, which stream is this request's.
    pub stream: u64,
    /// Whether logarithms of probabilities are wanted, and of how many of the likeliest tokens beside the chosen one.
    pub log_probs: Option<usize>,
    /// Whether it may begin with tokens that a cache has seen, where the batcher keeps such beginnings. Not if something is
    /// wanted of every token of the prompt.
    pub reuse: bool,
}

/// What a step brought.
#[derive(Debug)]
pub enum Event {
    /// A request has a new token.
    Token {
        /// Which.
        id: Id,
        /// The token.
        token: u32,
        /// Its probability, where the request asked for it.
        log_probs: Option<LogProbs>,
    },
    /// A request has ended; nothing more will come of it.
    Finished {
        /// Which.
        id: Id,
        /// Whether a stop token ended it, and not its limit.
        stopped: bool,
        /// Tokens of the prompt that were not computed, since a cache had seen them.
        cached: usize,
        /// The text as its cache holds it: all tokens but the last new one. Dropping it gives its pages back.
        sequence: Sequence,
    },
}

/// A request on its way.
#[derive(Debug)]
struct Active {
    /// The prompt's and the new ones.
    tokens: Vec<u32>,
    prompt: usize,
    options: Options,
    stream: u64,
    log_probs: Option<usize>,
    /// Whether it may begin with tokens that a cache has seen.
    reuse: bool,
    /// Tokens that it first began with.
    cached: Option<usize>,
    /// While it runs.
    sequence: Option<Sequence>,
}

/// Requests, and the engine that they share. Dropping it cancels all of them.
#[derive(Debug)]
pub struct Batcher<'e, O: CacheOps> {
    engine: &'e mut Engine<O>,
    scheduler: Scheduler,
    active: BTreeMap<Id, Active>,
    /// Events that need no step.
    early: Vec<Event>,
    next: Id,
    preemptions: u64,
    /// Where beginnings of texts are kept, if they are.
    every: Option<usize>,
    prefix_stats: PrefixStats,
}

/// The engine's pages, and who holds them.
struct Pages<'a, O: CacheOps> {
    engine: &'a Engine<O>,
    active: &'a BTreeMap<Id, Active>,
}

impl<O: CacheOps> Pages<'_, O> {
    fn of<T>(&self, id: Id, ask: impl FnOnce(&Sequence) -> T) -> Option<T> {
        self.active.get(&id).and_then(|active| active.sequence.as_ref()).map(ask)
    }

    fn beginning(&self, id: Id) -> Option<&SequenceCache> {
        self.active.get(&id).and_then(|active| active.beginning(&self.engine.prefixes))
    }
}

impl<O: CacheOps> Memory for Pages<'_, O> {
    fn limit(&self) -> usize {
        self.engine.pool().limit()
    }

    fn free(&self) -> usize {
        self.engine.pool().limit() - self.engine.pool().pages_in_use()
    }

    fn held(&self, id: Id) -> usize {
        self.of(id, |sequence| self.engine.pages_held(sequence)).unwrap_or(0)
    }

    fn more(&self, id: Id, more: usize) -> usize {
        let runs = self.of(id, |sequence| self.engine.pages_needed(sequence, more));
        let begins = || self.beginning(id).map(|begun| begun.pages_needed(more));
        runs.or_else(begins).unwrap_or_else(|| self.worst(more))
    }

    fn worst(&self, tokens: usize) -> usize {
        self.engine.pool().worst_pages(tokens)
    }

    fn alone(&self, id: Id) -> usize {
        self.of(id, |sequence| sequence.cache.pages_alone()).unwrap_or(0)
    }

    fn head_start(&self, id: Id) -> HeadStart {
        let start = |begun: &SequenceCache| {
            let pages = begun.pages_alone();
            HeadStart { tokens: begun.tokens(), pages, shared: begun.pages() - pages }
        };
        self.beginning(id).map(start).unwrap_or_default()
    }
}

impl<'e, O: CacheOps> Batcher<'e, O> {
    /// No requests yet. `share` is the first guess of the pages that a text holds, relative to a full cache's.
    pub fn new(engine: &'e mut Engine<O>, limits: Limits, share: f64) -> Self {
        let scheduler = Scheduler::new(limits, share);
        let (active, early, prefix_stats) = (BTreeMap::new(), Vec::new(), PrefixStats::default());
        Self { engine, scheduler, active, early, next: 0, preemptions: 0, every: None, prefix_stats }
    }

    /// Takes a request into the queue. An error if the model or the memory could never take it to its end.
    pub fn submit(&mut self, request: Request) -> Result<Id, EngineError> {
        let Request { prompt, options, stream, log_probs, reuse } = request;
        let new = options.stop.max_new_tokens;
        ensure_fits(self.engine, &prompt, new)?;
        options.sampler.validate(self.engine.model().shape.vocab)?;
        let id = self.next;
        if new == 0 {
            self.early.push(Event::Finished { id, stopped: false, cached: 0, sequence: self.engine.sequence() });
        } else {
            // The last new token is never read.
            let lengths = (prompt.len(), prompt.len() + new - 1);
            self.scheduler.submit(id, lengths, &Pages { engine: self.engine, active: &self.active })?;
            let reuse = reuse && self.every.is_some();
            let (length, cached, sequence) = (prompt.len(), None, None);
            let active = Active { prompt: length, tokens: prompt, options, stream, log_probs, reuse, cached, sequence };
            self.active.insert(id, active);
        }
        self.next += 1;
        Ok(id)
    }

    /// Ends a request: nothing more comes of it, and its pages are free. What its cache held, if it ran.
    pub fn cancel(&mut self, id: Id) -> Option<Sequence> {
        self.early.retain(|event| !matches!(event, Event::Finished { id: early, .. } if *early == id));
        self.scheduler.remove(id, &Pages { engine: self.engine, active: &self.active });
        self.offer(id, true);
        self.active.remove(&id)?.sequence
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.early.is_empty()
    }

    /// Who runs and who waits.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The engine.
    pub fn engine(&self) -> &Engine<O> {
        self.engine
    }

    /// Times that a request lost its cache and began again.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Computes one pass, and says what came of it. After an error, which means that the plan was wrong, the batcher is of
    /// no more use.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let Plan { preempted, admitted, work } =
            self.scheduler.plan(&Pages { engine: self.engine, active: &self.active });
        self.preemptions += preempted.len() as u64;
        for id in preempted {
            self.send_back(id);
        }
        self.begin(&admitted);
        let mut events = std::mem::take(&mut self.early);
        if work.is_empty() {
            return Ok(events);
        }
        let mut sequences: Vec<Sequence> = work
            .iter()
            .map(|&(id, _)| self.request(id).sequence.take().expect("a job that runs has a cache"))
            .collect();
        let mut batch: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(&work)
            .map(|(sequence, (id, count))| {
                let from = sequence.tokens();
                (sequence, &self.active[id].tokens[from..from + count])
            })
            .collect();
        let logits = self.engine.last_logits(&mut batch)?;
        let vocab = self.engine.model().shape.vocab;
        for ((sequence, (id, _)), logits) in sequences.into_iter().zip(work).zip(logits.chunks_exact(vocab)) {
            let request = self.request(id);
            let read = sequence.tokens() == request.tokens.len();
            request.sequence = Some(sequence);
            self.offer(id, false);
            if !read {
                continue;
            }
            let request = self.request(id);
            let Options { sampler, stop } = &request.options;
            let (prompt, new) = request.tokens.split_at(request.prompt);
            let token = sampler.sample(logits, Place { prompt, new, stream: request.stream });
            let stopped = stop.at.contains(&token);
            let mut done = stopped;
            if !stopped {
                request.tokens.push(token);
                done = request.tokens.len() - request.prompt == stop.max_new_tokens;
                let log_probs = request.log_probs.map(|top| LogProbs::of(logits, token, top));
                events.push(Event::Token { id, token, log_probs });
            }
            let cached = request.cached.unwrap_or(0);
            match done {
                true => {
                    events.extend(self.cancel(id).map(|sequence| Event::Finished { id, stopped, cached, sequence }))
                }
                false => self.scheduler.grow(id),
            }
        }
        Ok(events)
    }

    fn request(&mut self, id: Id) -> &mut Active {
        self.active.get_mut(&id).expect("the scheduler knows of live requests alone")
    }
}
