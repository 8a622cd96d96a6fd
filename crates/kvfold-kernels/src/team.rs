//! Threads that share the work of one kernel.
//!
//! Decoding a token runs some hundred short kernels one after the other, so what counts is how soon the other threads begin and how
//! soon the last one is known to have ended. Those that have nothing to do watch for a moment before they sleep, and
//! nobody waits for a thread that has not begun.
//!
//! Work is cut into tasks by its caller, never by the number of threads that take them, so no result depends on it.

use std::any::Any;
use std::cell::{RefCell, UnsafeCell};
use std::hint::spin_loop;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

/// Looks for work, a few dozen cycles each, before a thread sleeps.
const WATCH: usize = 4096;

/// Looks for the end of work before a thread lets others run: they may have the core that the work needs.
const PATIENCE: usize = 16 * 1024;

/// What the members are to do: tasks from 0 to a count.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}

/// In `state`: a job may be joined.
const OPEN: u64 = 1 << 31;
/// In `state`: one more job than before. The bits below [`OPEN`] count the members at work.
const NEXT: u64 = 1 << 32;

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// The first task that nobody has taken.
    next: AtomicUsize,
    /// Members that sleep, or are about to.
    asleep: AtomicUsize,
    door: Mutex<()>,
    bell: Condvar,
    ended: AtomicBool,
    /// What a member's task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the one caller that has the turn while the state is closed and no member at work, and read by members
// that have joined an open state; what it points to is Sync and outlives the job, since `Team::run` waits for all who joined.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes tasks until none is left.
    fn work(&self, job: Job) {
        // SAFETY: the caller of `run` keeps the function alive until everybody who joined has left.
        let task = unsafe { &*job.task };
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.count {
                return;
            }
            task(index);
        }
    }

    /// A member's life: joins every job that it comes in time for.
    fn member(&self) {
        let mut seen = 0;
        while let Some(state) = self.await_job(seen) {
            if self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state / NEXT;
            // SAFETY: joined, so nobody writes it.
            let job = unsafe { *self.job.get() }.expect("an open job");
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(job))) {
                lock(&self.panic).get_or_insert(panic);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state of an open job other than the last one seen; none when the team has ended.
    fn await_job(&self, seen: u64) -> Option<u64> {
        let found = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state / NEXT != seen).then_some(state)
        };
        loop {
            for _ in 0..WATCH {
                if let Some(state) = found() {
                    return Some(state);
                }
                spin_loop();
            }
            let mut guard = lock(&self.door);
            self.asleep.fetch_add(1, Ordering::SeqCst);
            while found().is_none() && !self.ended.load(Ordering::SeqCst) {
                guard = self.bell.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
            if self.ended.load(Ordering::SeqCst) {
                return None;
            }
        }
    }

    /// Wakes members that sleep.
    fn ring(&self) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.door));
            self.bell.notify_all();
        }
    }
}

/// Some threads and the one that calls.
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
    /// Held by the one whose job the members work at.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.door));
        self.shared.bell.notify_all();
        for member in self.members.drain(..) {
            // A member catches what its tasks panic with.
            let _ = member.join();
        }
    }
}

static GLOBAL: OnceLock<Arc<Team>> = OnceLock::new();

thread_local! {
    static CURRENT: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

impl Team {
    /// The caller's thread alone.
    fn alone() -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            asleep: AtomicUsize::new(0),
            door: Mutex::new(()),
            bell: Condvar::new(),
            ended: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        Self { shared, members: Vec::new(), turn: Mutex::new(()) }
    }

    /// A team of `threads` threads, the caller's included.
    ///
    /// # Errors
    /// When the system does not give so many threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        let mut team = Self::alone();
        for n in 1..threads {
            let shared = Arc::clone(&team.shared);
            team.members.push(thread::Builder::new().name(format!("kernel {n}")).spawn(move || shared.member())?);
        }
        Ok(team)
    }

    /// Makes this the team that kernels use where no other is [installed](Team::install), if none is in use yet; one that is
    /// not told otherwise has a thread per core. Returns whether it did.
    pub fn set_global(self) -> bool {
        GLOBAL.set(Arc::new(self)).is_ok()
    }

    /// Runs `f`, whose kernels on this thread use this team.
    pub fn install<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Arc<Team>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _restore = Restore(CURRENT.replace(Some(Arc::clone(self))));
        f()
    }

    /// The team of this thread.
    fn current() -> Arc<Self> {
        CURRENT.with_borrow(Option::clone).unwrap_or_else(|| {
            let whole = || Self::new(thread::available_parallelism().map_or(1, NonZeroUsize::get));
            Arc::clone(GLOBAL.get_or_init(|| Arc::new(whole().unwrap_or_else(|_| Self::alone()))))
        })
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.members.len() + 1
    }

    /// Carries out tasks 0 to `count`, each once, in that order but side by side. A task's panic is the caller's.
    pub fn run(&self, count: usize, task: impl Fn(usize) + Sync) {
        // Tasks of a task, or of another thread while the members are busy, are carried out here and now.
        let turn = match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_turn) = turn.filter(|_| count > 1 && !self.members.is_empty()) else {
            (0..count).for_each(task);
            return;
        };
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes, and nobody uses it after `Job` is closed and all have left, below.
        let task: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, count };
        // SAFETY: this thread has the turn and closed the last job, whose members have left.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let opened = shared.state.load(Ordering::Relaxed).wrapping_add(NEXT) | OPEN;
        shared.state.store(opened, Ordering::SeqCst);
        shared.ring();
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(job)));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while shared.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            looks += 1;
            if looks < PATIENCE { spin_loop() } else { thread::yield_now() }
        }
        let others = lock(&shared.panic).take();
        if let Some(panic) = own.err().or(others) {
            resume_unwind(panic);
        }
    }
}

/// Threads of this thread's team.
pub fn threads() -> usize {
    Team::current().threads()
}

/// Carries out tasks 0 to `count` with this thread's team.
pub(crate) fn run(count: usize, task: impl Fn(usize) + Sync) {
    Team::current().run(count, task);
}

/// What `f` makes of each item, in order.
pub fn map<T: Send, R: Send>(items: impl IntoIterator<Item = T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    let items: Vec<_> = items.into_iter().collect();
    let mut results: Vec<_> = items.iter().map(|_| None).collect();
    each(items.into_iter().zip(&mut results), |(item, to)| *to = Some(f(item)));
    results.into_iter().map(|result| result.expect("each task is carried out")).collect()
}

/// Calls `f` with each item.
pub(crate) fn each<T: Send>(items: impl IntoIterator<Item = T>, f: impl Fn(T) + Sync) {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    run(items.len(), |index| f(lock(&items[index]).take().expect("each task is carried out once")));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn team(threads: usize) -> Team {
        Team::new(threads).unwrap()
    }

    #[test]
    fn every_task_is_carried_out_once() {
        for threads in [1, 2, 5] {
            let team = team(threads);
            assert_eq!(team.threads(), threads);
            for count in (0..40).chain([1000, 10_000]) {
                let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                team.run(count, |index| {
                    done[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1), "{threads} threads, {count} tasks");
            }
        }
    }

    /// Many short jobs with pauses of every length in between: no wake-up is lost, and no job is left before its end.
    #[test]
    fn members_come_and_sleep_at_any_moment() {
        let team = team(4);
        let total = AtomicUsize::new(0);
        for round in 0..20_000usize {
            let count = round % 7;
            team.run(count, |_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
            if round % 1000 == 0 {
                thread::sleep(std::time::Duration::from_micros((round / 10) as u64));
            }
        }
        assert_eq!(total.into_inner(), (0..20_000).map(|round| round % 7).sum());
    }

    #[test]
    fn tasks_may_have_tasks_and_callers_may_share() {
        let team = team(3);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(10, |_| {
                            team.run(10, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 3 * 200 * 100);
    }

    #[test]
    fn a_panic_is_the_callers_and_the_team_lives_on() {
        let team = team(3);
        for bad in 0..50 {
            let caught = catch_unwind(AssertUnwindSafe(|| team.run(50, |index| assert!(index != bad, "task {index}"))));
            let message = caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("task {bad}"));
        }
        let done = AtomicUsize::new(0);
        team.run(50, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 50);
    }

    #[test]
    fn an_installed_team_is_used_until_its_end() {
        let before = threads();
        let (two, seven) = (Arc::new(team(2)), Arc::new(team(7)));
        two.install(|| {
            assert_eq!(threads(), 2);
            seven.install(|| assert_eq!(threads(), 7));
            assert_eq!(threads(), 2);
            assert_eq!(map(0..100, |x| x * x), (0..100).map(|x| x * x).collect::<Vec<_>>());
        });
        assert_eq!(threads(), before);
    }
}
