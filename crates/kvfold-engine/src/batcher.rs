//! Many requests on one engine: continuous batching, step by step.
//!
//! A request waits, runs, and ends; each step computes one pass over whoever the [`Scheduler`] chose, prompts in chunks
//! beside those that decode. It ends by itself, or is cancelled at any moment, and its pages are free for the next step.
//! Beginnings of texts may be kept for requests that begin so (`prefixes.rs`).

mod prefixes;

pub use prefixes::{PrefixSettings, PrefixStats};

use crate::constraint::Constraint;
use crate::engine::{Engine, EngineError, Kind, Part, Rows, Sequence};
use crate::generate::{Options, ensure_fits};
use crate::sampler::{LogProbs, Place};
use crate::scheduler::{Demand, HeadStart, Id, Limits, Memory, Plan, Scheduler};
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
    /// The same of the prompt's tokens.
    pub prompt_log_probs: Option<usize>,
    /// How its cache is held.
    pub kind: Kind,
    /// A form that the new text must have.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether it may begin with tokens that a cache has seen, where the batcher keeps such beginnings. Not heeded where
    /// something is wanted of every token of the prompt.
    pub reuse: bool,
}

impl Request {
    /// A request that wants nothing but tokens.
    pub fn new(prompt: Vec<u32>, options: Options) -> Self {
        let (kind, constraint) = (Kind::default(), None);
        Self { prompt, options, stream: 0, log_probs: None, prompt_log_probs: None, kind, constraint, reuse: true }
    }
}

/// What a step brought.
#[derive(Debug)]
pub enum Event {
    /// A request's prompt is read, and it asked for its probabilities.
    Prompt {
        /// Which.
        id: Id,
        /// Those of the prompt's tokens, from the second on.
        log_probs: Vec<LogProbs>,
    },
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
        /// Whether a stop token, or a constraint that is met, ended it, and not its limit.
        stopped: bool,
        /// The stop token, which is no part of the text, and its probability, where the request asked for it.
        stop: Option<(u32, Option<LogProbs>)>,
        /// Tokens of the prompt that were not computed, since a cache had seen them.
        cached: usize,
        /// The text as its cache holds it: all tokens but the last new one. Dropping it gives its pages back.
        sequence: Sequence,
    },
    /// A request's constraint failed; nothing more will come of it.
    Failed {
        /// Which.
        id: Id,
        /// What the constraint says.
        reason: String,
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
    prompt_log_probs: Option<usize>,
    /// Of the prompt's tokens, from the second on, as far as they are read.
    prompt_said: Vec<LogProbs>,
    kind: Kind,
    constraint: Option<Box<dyn Constraint>>,
    /// Whether it may begin with tokens that a cache has seen.
    reuse: bool,
    /// Tokens that it first began with.
    cached: Option<usize>,
    /// While it runs.
    sequence: Option<Sequence>,
}

/// What a chosen token comes to.
enum Chosen {
    /// With it the text may be at its end, by a constraint that is met (true) or by its limit (false).
    Token {
        token: u32,
        log_probs: Option<LogProbs>,
        ended: Option<bool>,
    },
    /// The text ends, and this token is not part of it.
    End {
        token: u32,
        log_probs: Option<LogProbs>,
    },
    Failed(String),
}

impl Active {
    /// Whether probabilities of the prompt are still to be found.
    fn scores(&self) -> bool {
        self.prompt_log_probs.is_some() && self.prompt_said.len() + 1 < self.prompt
    }

    /// Probabilities of the prompt tokens that follow the tokens from `first` on, whose logits are `[rows, V]`. What was read
    /// before a preemption is known.
    fn scored(&self, first: usize, logits: &[f32], vocab: usize) -> Vec<LogProbs> {
        let top = self.prompt_log_probs.unwrap_or(0);
        let next = (first + 1..self.prompt).zip(logits.chunks_exact(vocab));
        let new = next.filter(|(next, _)| *next > self.prompt_said.len());
        new.map(|(next, logits)| LogProbs::of(logits, self.tokens[next], top)).collect()
    }

    /// Chooses the token that follows all that were read.
    fn choose(&mut self, logits: &mut [f32]) -> Chosen {
        let (prompt, new) = self.tokens.split_at(self.prompt);
        let Options { sampler, stop } = &self.options;
        let changes = self.constraint.is_some() || new.len() < stop.min_new_tokens;
        let own = (self.log_probs.is_some() && changes).then(|| logits.to_vec());
        if new.len() < stop.min_new_tokens {
            stop.at.iter().for_each(|&token| logits[token as usize] = f32::NEG_INFINITY);
        }
        if let Some(Err(reason)) = self.constraint.as_mut().map(|constraint| constraint.restrict(logits)) {
            return Chosen::Failed(reason);
        }
        let token = sampler.sample(logits, Place { prompt, new, stream: self.stream });
        let log_probs = self.log_probs.map(|top| LogProbs::of(own.as_deref().unwrap_or(logits), token, top));
        if stop.at.contains(&token) {
            return Chosen::End { token, log_probs };
        }
        let complete = match self.constraint.as_mut().map(|constraint| constraint.take(token)) {
            Some(Err(reason)) => return Chosen::Failed(reason),
            Some(Ok(complete)) => complete,
            None => false,
        };
        let ended = if complete { Some(true) } else { (new.len() + 1 == stop.max_new_tokens).then_some(false) };
        self.tokens.push(token);
        Chosen::Token { token, log_probs, ended }
    }
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
    /// Where beginnings are kept, if they are.
    every: Option<usize>,
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

    fn soon_more(&self, id: Id, admitted: &[Id]) -> bool {
        let (Some(every), Some(waits)) = (self.every, self.active.get(&id).filter(|waits| waits.reuse)) else {
            return false;
        };
        let now = self.beginning(id).map_or(0, SequenceCache::tokens);
        self.active.range(..id).any(|(older, active)| {
            let read = active.sequence.as_ref().map(Sequence::tokens).or(admitted.contains(older).then_some(0));
            read.is_some_and(|read| active.will_keep(read, waits, every) > now)
        })
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
        let Request { prompt, options, stream, log_probs, prompt_log_probs, kind, constraint, reuse } = request;
        let new = options.stop.max_new_tokens;
        ensure_fits(self.engine, &prompt, new)?;
        options.validate(self.engine.model().shape.vocab)?;
        let id = self.next;
        if new == 0 && prompt_log_probs.is_none() {
            let sequence = self.engine.sequence_of(kind);
            self.early.push(Event::Finished { id, stopped: false, stop: None, cached: 0, sequence });
        } else {
            // The last new token is never read.
            let most = prompt.len() + new.saturating_sub(1);
            let demand = Demand { known: prompt.len(), most, folds: !kind.full };
            let memory = Pages { engine: self.engine, active: &self.active, every: self.every };
            self.scheduler.submit(id, demand, &memory)?;
            let active = Active {
                prompt: prompt.len(),
                tokens: prompt,
                options,
                stream,
                log_probs,
                prompt_log_probs,
                prompt_said: Vec::new(),
                kind,
                constraint,
                reuse: reuse && self.every.is_some() && prompt_log_probs.is_none() && !kind.trace,
                cached: None,
                sequence: None,
            };
            self.active.insert(id, active);
        }
        self.next += 1;
        Ok(id)
    }

    /// Ends a request: nothing more comes of it, and its pages are free. What its cache held, if it ran.
    pub fn cancel(&mut self, id: Id) -> Option<Sequence> {
        self.early.retain(|event| !matches!(event, Event::Finished { id: early, .. } if *early == id));
        self.scheduler.remove(id, &Pages { engine: self.engine, active: &self.active, every: self.every });
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

    /// Tokens of a request's prompt that were not computed, since a cache had seen them.
    pub fn cached(&self, id: Id) -> usize {
        self.active.get(&id).and_then(|active| active.cached).unwrap_or(0)
    }

    /// A request's cache, while it runs.
    pub fn sequence(&self, id: Id) -> Option<&Sequence> {
        self.active.get(&id)?.sequence.as_ref()
    }

    /// Times that a request lost its cache and began again.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Computes one pass, and says what came of it. After an error, which means that the plan was wrong, the batcher is of
    /// no more use.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let Plan { preempted, admitted, work } =
            self.scheduler.plan(&Pages { engine: self.engine, active: &self.active, every: self.every });
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
        let taken: Vec<usize> = sequences.iter().map(Sequence::tokens).collect();
        let mut batch: Vec<Part<'_>> = sequences
            .iter_mut()
            .zip(&work)
            .map(|(sequence, (id, count))| {
                let (from, request) = (sequence.tokens(), &self.active[id]);
                let rows = match () {
                    () if request.scores() => Rows::All,
                    () if from + count == request.tokens.len() => Rows::Last,
                    () => Rows::None,
                };
                Part { sequence, tokens: &request.tokens[from..from + count], rows }
            })
            .collect();
        let vocab = self.engine.model().shape.vocab;
        // Of each part the last logits, and the prompt's probabilities where they are wanted.
        let (mut last, mut scored) = (vec![Vec::new(); work.len()], Vec::new());
        let (engine, active) = (&mut *self.engine, &self.active);
        engine.read(&mut batch, |n, first, logits| {
            let (id, _) = work[n];
            last[n] = logits[logits.len() - vocab..].to_vec();
            if active[&id].scores() {
                scored.push((id, active[&id].scored(taken[n] + first, logits, vocab)));
            }
        })?;
        for (id, log_probs) in scored {
            self.request(id).prompt_said.extend(log_probs);
        }
        for ((sequence, (id, _)), mut logits) in sequences.into_iter().zip(work).zip(last) {
            let request = self.request(id);
            let read = sequence.tokens() == request.tokens.len();
            request.sequence = Some(sequence);
            self.offer(id, false);
            if read {
                self.go_on(id, &mut logits, &mut events);
            }
        }
        Ok(events)
    }

    /// What becomes of a request that has read all its tokens; logits `[V]` are of what follows.
    fn go_on(&mut self, id: Id, logits: &mut [f32], events: &mut Vec<Event>) {
        let request = self.request(id);
        if request.prompt_log_probs.take().is_some() {
            events.push(Event::Prompt { id, log_probs: std::mem::take(&mut request.prompt_said) });
        }
        let mut stop = None;
        let ended = match request.options.stop.max_new_tokens {
            0 => Some(false),
            _ => match request.choose(logits) {
                Chosen::End { token, log_probs } => {
                    stop = Some((token, log_probs));
                    Some(true)
                }
                Chosen::Failed(reason) => {
                    drop(self.cancel(id));
                    events.push(Event::Failed { id, reason });
                    return;
                }
                Chosen::Token { token, log_probs, ended } => {
                    events.push(Event::Token { id, token, log_probs });
                    ended
                }
            },
        };
        let cached = request.cached.unwrap_or(0);
        match ended {
            Some(stopped) => {
                let sequence = self.cancel(id);
                events.extend(sequence.map(|sequence| Event::Finished { id, stopped, stop, cached, sequence }));
            }
            None => self.scheduler.grow(id),
        }
    }

    fn request(&mut self, id: Id) -> &mut Active {
        self.active.get_mut(&id).expect("the scheduler knows of live requests alone")
    }
}
