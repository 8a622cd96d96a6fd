//! The scheduler against a simple memory: heads whose slots grow by chance.

use crate::common::Rng;
use kvfold_engine::scheduler::{Demand, Id, Limits, Memory, Scheduler};
use std::collections::{BTreeMap, BTreeSet};

const HEADS: usize = 3;
const PAGE: usize = 4;

/// Pages of heads that hold so many slots.
fn pages(slots: impl IntoIterator<Item = usize>) -> usize {
    slots.into_iter().map(|slots| slots.div_ceil(PAGE)).sum()
}

/// A job: slots of its heads while it runs, how readily its tokens get one, and what it is to become.
#[derive(Debug)]
struct Text {
    slots: Option<[usize; HEADS]>,
    appends: f64,
    taken: usize,
    known: usize,
    most: usize,
}

#[derive(Debug, Default)]
struct Table {
    limit: usize,
    preempted: usize,
    texts: BTreeMap<Id, Text>,
    /// Whether every third begins as the one before it does.
    alike: bool,
}

impl Memory for Table {
    fn limit(&self) -> usize {
        self.limit
    }

    fn free(&self) -> usize {
        self.limit - self.texts.values().filter_map(|text| text.slots).map(pages).sum::<usize>()
    }

    fn held(&self, id: Id) -> usize {
        self.texts[&id].slots.map_or(0, pages)
    }

    fn more(&self, id: Id, more: usize) -> usize {
        let slots = self.texts[&id].slots.unwrap_or_default();
        pages(slots.map(|slots| slots + more)) - pages(slots)
    }

    fn worst(&self, tokens: usize) -> usize {
        pages([tokens; HEADS])
    }

    fn soon_more(&self, id: Id, admitted: &[Id]) -> bool {
        let reads = |text: &Text| text.slots.is_some() && text.taken < text.known;
        let before = id.checked_sub(1).and_then(|before| Some((before, self.texts.get(&before)?)));
        self.alike
            && id.is_multiple_of(3)
            && before.is_some_and(|(before, text)| reads(text) || admitted.contains(&before))
    }
}

/// Carries out one step of the scheduler, and checks it.
fn step(scheduler: &mut Scheduler, table: &mut Table, rng: &mut Rng, limits: Limits) -> Vec<Id> {
    let oldest = scheduler.running() > 0;
    let plan = scheduler.plan(table);
    for id in &plan.preempted {
        let text = table.texts.get_mut(id).unwrap();
        assert!(text.slots.take().is_some(), "{id} lost a cache that it did not have");
        text.taken = 0;
        table.preempted += 1;
    }
    for id in &plan.admitted {
        let text = table.texts.get_mut(id).unwrap();
        assert!(text.slots.replace([0; HEADS]).is_none(), "{id} was admitted twice");
    }
    assert!(!oldest || !plan.work.is_empty(), "somebody runs and nobody does anything");
    let ids: BTreeSet<Id> = plan.work.iter().map(|work| work.0).collect();
    assert_eq!(ids.len(), plan.work.len(), "a job has work twice: {plan:?}");
    let needed: usize = plan.work.iter().map(|&(id, count)| table.more(id, count)).sum();
    assert!(needed <= table.free(), "{needed} pages can be needed of {}: {plan:?}", table.free());
    let prompts: usize = plan.work.iter().map(|work| work.1).filter(|&count| count > 1).sum();
    assert!(prompts <= limits.tokens && scheduler.running() <= limits.running, "{plan:?}");

    let mut over = Vec::new();
    for (id, count) in plan.work {
        let text = table.texts.get_mut(&id).unwrap();
        assert!(count > 0 && text.taken + count <= text.known, "{id} takes {count}: {text:?}");
        let slots = text.slots.as_mut().unwrap();
        for _ in 0..count {
            slots.iter_mut().for_each(|slots| *slots += usize::from(*slots == 0 || rng.unit() < text.appends));
        }
        text.taken += count;
        if text.taken == text.known {
            match text.known < text.most {
                true => {
                    text.known += 1;
                    scheduler.grow(id);
                }
                false => over.push(id),
            }
        }
    }
    for id in &over {
        scheduler.remove(*id, table);
        table.texts.remove(id);
    }
    over
}

fn submit(scheduler: &mut Scheduler, table: &mut Table, id: Id, (known, most, appends): (usize, usize, f64)) {
    let fits = table.worst(most) <= table.limit;
    let taken = scheduler.submit(id, Demand { known, most, folds: true }, table);
    assert_eq!(taken.is_ok(), fits, "{taken:?}");
    if fits {
        table.texts.insert(id, Text { slots: None, appends, taken: 0, known, most });
    }
}

/// A million steps and more of jobs that come, go, and fold as they please.
#[test]
fn no_page_is_promised_twice_and_every_job_ends() {
    let (mut operations, mut preempted, mut cancelled, mut refused) = (0, 0, 0, 0);
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let limits = Limits { tokens: rng.pick(&[1, 8, 40]), running: rng.pick(&[1, 3, 12, 100]) };
        let mut table = Table { limit: rng.within(6..80), alike: seed % 2 == 1, ..Table::default() };
        let mut scheduler = Scheduler::new(limits, rng.pick(&[0.05, 0.25, 1.0]));
        let mut next = 0;
        for _ in 0..18_000 {
            operations += 1;
            match rng.within(0..20) {
                0 if table.texts.len() < 40 => {
                    let known = rng.within(1..40);
                    let before = table.texts.len();
                    let job = (known, known + rng.within(0..40), rng.pick(&[0.0, 0.2, 0.5, 1.0]));
                    submit(&mut scheduler, &mut table, next, job);
                    refused += usize::from(table.texts.len() == before);
                    next += 1;
                }
                1 if !table.texts.is_empty() => {
                    let ids: Vec<Id> = table.texts.keys().copied().collect();
                    let id = rng.pick(&ids);
                    scheduler.remove(id, &table);
                    table.texts.remove(&id);
                    cancelled += 1;
                }
                _ => {
                    step(&mut scheduler, &mut table, &mut rng, limits);
                }
            }
            assert_eq!(scheduler.running() + scheduler.waiting(), table.texts.len());
            assert!((0.0..=1.0).contains(&scheduler.predicted_share()));
        }
        // Everyone who is left ends: of at most 40 jobs of 80 tokens, each is the oldest at some time.
        for _ in 0..2 * 40 * 80 {
            step(&mut scheduler, &mut table, &mut rng, limits);
            operations += 1;
        }
        preempted += table.preempted;
        assert!(table.texts.is_empty(), "{seed}: {table:?} in {scheduler:?}");
        assert_eq!((table.free(), scheduler.running(), scheduler.waiting()), (table.limit, 0, 0));
    }
    assert!(operations > 1_000_000, "{operations}");
    assert!(preempted > 20 && cancelled > 1000 && refused > 100, "{preempted}, {cancelled}, {refused}");
}

/// Texts that fold nothing, in a memory for one and a half of them.
#[test]
fn texts_that_refuse_to_fold_slow_the_queue_and_end_in_order() {
    let limits = Limits { tokens: 16, running: 100 };
    let mut table = Table { limit: pages([100; HEADS]) * 3 / 2, ..Table::default() };
    // The first guess is far too good.
    let mut scheduler = Scheduler::new(limits, 0.1);
    let mut rng = Rng::new(7);
    (0..20).for_each(|id| submit(&mut scheduler, &mut table, id, (60, 100, 1.0)));
    let mut over = Vec::new();
    let mut steps = 0;
    while !table.texts.is_empty() {
        over.extend(step(&mut scheduler, &mut table, &mut rng, limits));
        steps += 1;
        assert!(steps < 20 * 100, "{over:?}");
    }
    assert_eq!(over, (0..20).collect::<Vec<_>>());
    assert!(scheduler.predicted_share() > 0.8, "what was seen is learned: {}", scheduler.predicted_share());
}

/// Jobs that fold run together in memory that would hold one of them.
#[test]
fn jobs_are_admitted_by_what_jobs_before_them_held() {
    let limits = Limits { tokens: 64, running: 100 };
    let mut together = Vec::new();
    for share in [0.25, 1.0] {
        let mut table = Table { limit: pages([400; HEADS]), ..Table::default() };
        let mut scheduler = Scheduler::new(limits, share);
        let mut rng = Rng::new(3);
        let mut most = 0;
        (0..60).for_each(|id| submit(&mut scheduler, &mut table, id, (150, 200, 0.1)));
        while !table.texts.is_empty() {
            step(&mut scheduler, &mut table, &mut rng, limits);
            most = most.max(scheduler.running());
        }
        together.push(most);
        assert!((0.08..0.25).contains(&scheduler.predicted_share()), "{}", scheduler.predicted_share());
    }
    // Two of 200 tokens fit in the worst case; ten times as many when it is known that they fold.
    assert!(together[0] >= 8 && together[1] >= 8, "{together:?}");
}

/// Of many jobs that fold alike less is set aside for chance than a tenth of each, and none has to be sent back.
#[test]
fn what_is_set_aside_for_chance_is_learned() {
    let limits = Limits { tokens: 4096, running: 1000 };
    let (most, share) = (400, 0.25);
    let mut table = Table { limit: 20 * pages([most; HEADS]), ..Table::default() };
    let mut scheduler = Scheduler::new(limits, share);
    let mut rng = Rng::new(11);
    let mut together = Vec::new();
    for _ in 0..6 {
        let first = table.texts.len() as Id + 1000 * together.len() as Id;
        (first..first + 120).for_each(|id| submit(&mut scheduler, &mut table, id, (most / 2, most, share)));
        let mut running = 0;
        while !table.texts.is_empty() {
            step(&mut scheduler, &mut table, &mut rng, limits);
            running = running.max(scheduler.running());
        }
        together.push(running);
    }
    // Twenty full caches, a quarter of each: eighty, and nearly as many are admitted once it is known.
    assert!(together.last().is_some_and(|last| (74..=80).contains(last)), "{together:?}");
    assert_eq!(table.preempted, 0);
}
