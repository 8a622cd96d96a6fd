//! Who computes next, and who waits for memory: a state machine that knows no model.
//!
//! Jobs are known by number. Each step the scheduler hands out tokens to take: one to every running job that decodes, what
//! is left of the step's budget to prompts, oldest first, and to jobs that wait, in the order in which they came.
//!
//! How far a text folds is known only once it is read, so memory is promised on a prediction and defended on the worst
//! case:
//!
//! * a job is admitted, in turn, when the pages that it is *predicted* to hold in the end fit beside those predicted of all others
//!   that run; the prediction is what jobs before it held, relative to what they would have held if nothing had folded, and how
//!   far they differed: of many jobs that differ by chance less is set aside for chance than of each alone;
//! * a job takes tokens only if the pages that these can need *at most* are free. The oldest job's are set aside first,
//!   and younger ones are sent back to the queue for them, youngest first; any other job that finds none just waits;
//! * a job that could outgrow all of the memory by itself is refused when it comes.
//!
//! So the oldest job takes tokens in every step, or the next one, and ends, whatever the texts do, and after it the next. A
//! job that was sent back begins again with all the tokens it has; since a sequence's bytes depend on nothing beside it
//! (promise I3), nobody sees a difference but in time.
//!
//! A job may begin with tokens that a cache has seen ([`HeadStart`]). Pages of caches that nobody runs on are free here: they
//! are given up as soon as somebody needs them. Pages that several jobs share are counted once. A job whose beginning is being
//! read by an older one lets others pass until it is: only older ones, so that nobody waits for ever.

use std::collections::VecDeque;

/// A job's number, the caller's choice.
pub type Id = u64;

/// What a step may hand out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a step, those of decoding included. A step hands out at least one to every job that decodes.
    pub tokens: usize,
    /// Jobs that run at the same time.
    pub running: usize,
}

/// Pages, as the cache counts them.
pub trait Memory {
    /// All there are.
    fn limit(&self) -> usize;
    /// Those that nobody holds who runs.
    fn free(&self) -> usize;
    /// Those that a running job holds.
    fn held(&self, id: Id) -> usize;
    /// Those that `more` tokens of a job can need beyond what it holds, or of one that waits, beyond what it can begin
    /// with, at most.
    fn more(&self, id: Id, more: usize) -> usize;
    /// Those that a job of `tokens` tokens holds if nothing folds.
    fn worst(&self, tokens: usize) -> usize;
    /// Those that a running job holds and no other does.
    fn alone(&self, id: Id) -> usize {
        self.held(id)
    }
    /// What a job that waits can begin with.
    fn head_start(&self, _id: Id) -> HeadStart {
        HeadStart::default()
    }
    /// Whether a job that waits can begin with more if it waits a little: an older one that runs, or is among those that are
    /// `admitted` now, is reading what both begin with.
    fn soon_more(&self, _id: Id, _admitted: &[Id]) -> bool {
        false
    }
}

/// A part of a job's tokens that a cache has seen already: fewer than all there are to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadStart {
    /// The tokens.
    pub tokens: usize,
    /// Pages that it takes of the free ones to begin with them, at most.
    pub pages: usize,
    /// Pages of them that running jobs hold, which it will share.
    pub shared: usize,
}

/// A job that can never run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a text of {tokens} tokens can need {needed} pages of cache and there are {limit} in all; ask for fewer tokens, or allow more memory"
)]
pub struct TooLarge {
    /// Tokens that it has at most.
    pub tokens: usize,
    /// Pages that these can need.
    pub needed: usize,
    /// Pages there are.
    pub limit: usize,
}

/// What happens in a step, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Jobs that lose their caches and wait again.
    pub preempted: Vec<Id>,
    /// Jobs that begin, with the tokens of their [`HeadStart`] or with empty caches.
    pub admitted: Vec<Id>,
    /// Tokens that running jobs take.
    pub work: Vec<(Id, usize)>,
}

/// What a job will ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Tokens there are to take.
    pub known: usize,
    /// Tokens when it is at its longest.
    pub most: usize,
    /// Whether its tokens may fold. One whose tokens may not is predicted to hold its worst case.
    pub folds: bool,
}

/// A job's tokens.
#[derive(Clone, Copy, Debug)]
struct Job {
    id: Id,
    /// Whether they may fold.
    folds: bool,
    /// Tokens that its cache has taken.
    taken: usize,
    /// Tokens there are to take.
    known: usize,
    /// Tokens that its cache takes at most before it ends.
    most: usize,
}

impl Job {
    fn left(&self) -> usize {
        self.known - self.taken
    }

    /// Tokens that are left, but none past a multiple of `stops`.
    fn before_stop(&self, stops: usize) -> usize {
        self.left().min(stops - self.taken % stops)
    }
}

/// Weight of one more job in the prediction, once there were as many as this makes it one of.
const NEWEST: f64 = 0.1;

/// What jobs hold together is thought to be below the prediction by so many standard deviations: being wrong costs a job its
/// work.
const SURE: f64 = 2.0;

/// Standard deviation of the first guess, relatively.
const GUESSED: f64 = 0.1;

/// Tokens below which a job says nothing about how far texts fold.
const TELLING: usize = 64;

/// The queue and who runs.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Job>,
    /// Oldest first.
    running: Vec<Job>,
    /// Pages held at a job's end, over those that it would have held if nothing had folded: the mean, and the variance.
    share: f64,
    variance: f64,
    /// What the prediction is made of: the first guess, and jobs.
    seen: u32,
    /// A job that reads several tokens stops at multiples of this.
    stops: usize,
}

impl Scheduler {
    /// Nobody waits. `share` is the first guess of the pages that a job holds over those of a full cache: 1 without
    /// compression.
    pub fn new(limits: Limits, share: f64) -> Self {
        let (waiting, running) = (VecDeque::new(), Vec::new());
        let share = share.clamp(0.0, 1.0);
        Self { limits, waiting, running, share, variance: (GUESSED * share).powi(2), seen: 1, stops: usize::MAX }
    }

    /// From now on no step takes a job past a multiple of `tokens` tokens, at least 1, but only up to it.
    pub fn stop_at_multiples_of(&mut self, tokens: usize) {
        self.stops = tokens.max(1);
    }

    /// Takes a job into the queue.
    pub fn submit(&mut self, id: Id, demand: Demand, memory: &impl Memory) -> Result<(), TooLarge> {
        let Demand { known, most, folds } = demand;
        let (tokens, limit) = (most.max(known), memory.limit());
        let needed = memory.worst(tokens);
        if needed > limit {
            return Err(TooLarge { tokens, needed, limit });
        }
        self.waiting.push_back(Job { id, folds, taken: 0, known, most: tokens });
        Ok(())
    }

    /// A running job has one more token to take.
    pub fn grow(&mut self, id: Id) {
        if let Some(job) = self.running.iter_mut().find(|job| job.id == id) {
            job.known += 1;
            job.most = job.most.max(job.known);
        }
    }

    /// A job is over, done or cancelled, wherever it is. To be told while the job still holds its pages.
    pub fn remove(&mut self, id: Id, memory: &impl Memory) {
        if let Some(at) = self.running.iter().position(|job| job.id == id) {
            let Job { taken, folds, .. } = self.running.remove(at);
            if folds && taken >= TELLING {
                let share = memory.held(id) as f64 / memory.worst(taken).max(1) as f64;
                self.seen = self.seen.saturating_add(1);
                let (weight, off) = (NEWEST.max(1.0 / f64::from(self.seen)), share.min(1.0) - self.share);
                self.share += weight * off;
                self.variance = (1.0 - weight) * (self.variance + weight * off * off);
            }
        }
        self.waiting.retain(|job| job.id != id);
    }

    /// Jobs that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Pages held at a job's end over those of a full cache, as far as jobs have shown.
    pub fn predicted_share(&self) -> f64 {
        self.share
    }

    /// The next step. What it hands out counts as taken.
    pub fn plan(&mut self, memory: &impl Memory) -> Plan {
        let mut plan = Plan::default();
        let mut free = memory.free();
        let mut budget = self.limits.tokens;

        // The oldest job's pages, from younger ones if need be. It decodes, or takes what it can of its prompt.
        let mut given = vec![0; self.running.len()];
        if let Some(&oldest) = self.running.first() {
            let wanted = oldest.before_stop(self.stops).min(budget.max(1));
            while memory.more(oldest.id, wanted.min(1)) > free && self.running.len() > 1 {
                free += self.preempt(memory, &mut plan);
            }
            given.truncate(self.running.len());
            given[0] = fitting(wanted, free, |tokens| memory.more(oldest.id, tokens));
            free -= memory.more(oldest.id, given[0]);
            budget = budget.saturating_sub(given[0]);
        }
        // Those that decode, then prompts.
        for decodes in [true, false] {
            for (job, given) in self.running.iter().zip(&mut given).skip(1) {
                if (job.left() == 1) == decodes {
                    let wanted = if decodes { 1 } else { job.before_stop(self.stops).min(budget) };
                    *given = fitting(wanted, free, |tokens| memory.more(job.id, tokens));
                    free -= memory.more(job.id, *given);
                    budget = budget.saturating_sub(*given);
                }
            }
        }
        for (job, given) in self.running.iter_mut().zip(given).filter(|(_, given)| *given > 0) {
            job.taken += given;
            plan.work.push((job.id, given));
        }

        // Whoever was sent back waits until what was needed is there.
        let open = plan.preempted.is_empty();
        let held = |job: &Job| memory.held(job.id);
        let shared = self.running.iter().map(held).sum::<usize>().saturating_sub(memory.limit() - memory.free());
        let mut promised = Predicted::default().sharing(shared);
        for job in &self.running {
            promised.add(self.predicted(job, memory).at_least(held(job)));
        }
        while open && budget > 0 && self.running.len() < self.limits.running {
            let ready = |job: &Job| !memory.soon_more(job.id, &plan.admitted);
            let Some(at) = self.waiting.iter().position(ready) else { break };
            let first = self.waiting[at];
            let start = memory.head_start(first.id);
            let first = Job { taken: start.tokens, ..first };
            let mut with_it = promised;
            with_it.add(self.predicted(&first, memory).sharing(start.shared));
            if !self.running.is_empty() && with_it.at_most() > memory.limit() as f64 {
                break;
            }
            let wanted = first.before_stop(self.stops).min(budget);
            let pages = |tokens| start.pages + memory.more(first.id, tokens);
            let taken = fitting(wanted, free, pages);
            if taken == 0 {
                break;
            }
            self.waiting.remove(at);
            self.running.push(Job { taken: first.taken + taken, ..first });
            plan.admitted.push(first.id);
            plan.work.push((first.id, taken));
            free -= pages(taken);
            budget -= taken;
            promised = with_it;
        }
        plan
    }

    /// Sends the youngest job back to the front of the queue; the pages that surely come back. One that only jobs share that
    /// are sent back together is found free in the next step.
    fn preempt(&mut self, memory: &impl Memory, plan: &mut Plan) -> usize {
        let Some(job) = self.running.pop() else { return 0 };
        self.waiting.push_front(Job { taken: 0, ..job });
        plan.preempted.push(job.id);
        memory.alone(job.id)
    }

    /// Pages that a job is predicted to hold in the end.
    fn predicted(&self, job: &Job, memory: &impl Memory) -> Predicted {
        let worst = memory.worst(job.most) as f64;
        match job.folds {
            true => Predicted { pages: worst * self.share, variance: worst * worst * self.variance, worst },
            false => Predicted { pages: worst, variance: 0.0, worst },
        }
    }
}

/// Pages that are predicted: the mean, the variance, and what cannot be exceeded.
#[derive(Clone, Copy, Debug, Default)]
struct Predicted {
    pages: f64,
    variance: f64,
    worst: f64,
}

impl Predicted {
    /// Together with another job's.
    fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.variance += other.variance;
        self.worst += other.worst;
    }

    /// Of a job that holds some already.
    fn at_least(self, held: usize) -> Self {
        Self { pages: self.pages.max(held as f64), ..self }
    }

    /// Without pages that are counted elsewhere.
    fn sharing(self, shared: usize) -> Self {
        let shared = shared as f64;
        Self { pages: self.pages - shared, worst: self.worst - shared, ..self }
    }

    /// What is thought not to be exceeded.
    fn at_most(self) -> f64 {
        (self.pages + SURE * self.variance.sqrt()).min(self.worst)
    }
}

/// The most tokens up to `wanted` whose pages are free: all, or half as many again and again.
fn fitting(wanted: usize, free: usize, pages: impl Fn(usize) -> usize) -> usize {
    let mut tokens = wanted;
    while tokens > 0 && pages(tokens) > free {
        tokens /= 2;
    }
    tokens
}
