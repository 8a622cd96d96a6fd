//! Decisions set by hand: which slots they make, what the slots hold, and where they stand.
//!
//! No weights here: queries, keys, values and decisions are put in front of both attentions, the one over whole
//! sequences and the one over the paged cache. Token t's value is 1 in channel t and 0 elsewhere, so an output says how
//! much of each token is in what a query sees. Its key is `1 + t/10` in channel 0, whose rotary frequency is 1.

use crate::common::{cut, worst};
use kvfold_cache::{CachePolicy, CacheShape, Folding as FoldingCache, PagePool};
use kvfold_engine::{CachedAttend, Member};
use kvfold_kernels::dmc::{Decision, Dmc, Method, Share};
use kvfold_kernels::ops::{Heads, MIN_IMPORTANCE, Precision, Spans};
use kvfold_kernels::paged::CacheDType;
use kvfold_kernels::{Array, Ops, Reference};
use kvfold_model::attend::{Folding, Mode};
use kvfold_model::block::{Attend, Pass, Projected};
use kvfold_model::rope::{Rope, Scaling};
use kvfold_model::shape::Shape;

/// Head dim, more than any text here has tokens.
const DIM: usize = 32;

/// Channel 0 of every query.
const AIM: f64 = 3.0;

/// One layer's tokens, decided by hand.
#[derive(Clone, Debug)]
struct Scene {
    dmc: Dmc,
    group: usize,
    /// The decision logit of every token and KV head.
    logits: Vec<Vec<f64>>,
}

/// A slot that a query sees: its tokens, and the position of its key.
#[derive(Clone, Debug, PartialEq)]
struct Slot {
    tokens: Vec<usize>,
    position: usize,
}

/// Slots that stand where their last token stood.
fn slots(lists: &[&[usize]]) -> Vec<Slot> {
    let slot = |tokens: &&[usize]| Slot { tokens: tokens.to_vec(), position: *tokens.last().expect("a token") };
    lists.iter().map(slot).collect()
}

const HEAD: Decision = Decision::Head { scale: 2.0, offset: 0.75, bias: false, ahead: false };
const BORROWED: Decision = Decision::Borrowed { scale: 2.0, offset: 5.0 };
const FOLD: f64 = 0.5;
const KEEP: f64 = -0.5;

impl Scene {
    /// One KV head that folds where `alpha` is 1, at once and over whole segments.
    fn of(decision: Decision, alpha: &[u8]) -> Self {
        let dmc = Dmc {
            method: Method::Dmc,
            decision,
            delay: 0,
            sinks: 0,
            pool_window: None,
            log_mass: false,
            share: Share::Head,
        };
        let logit = |&a: &u8| vec![if a == 1 { FOLD } else { KEEP }];
        Self { dmc, group: 2, logits: alpha.iter().map(logit).collect() }
    }

    fn with(mut self, change: impl FnOnce(&mut Dmc)) -> Self {
        change(&mut self.dmc);
        self
    }

    fn len(&self) -> usize {
        self.logits.len()
    }

    fn kv(&self) -> usize {
        self.logits[0].len()
    }

    /// The importance logit of token t: what the head says, or the group's queries on average.
    fn u(t: usize) -> f64 {
        [0.3, -0.9, 0.6, 0.0, -0.2, 1.1, -1.4][t % 7]
    }

    /// Importance by the formulas of the spec (1.2) and of the head.
    fn omega(&self, t: usize) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self.dmc.decision {
            Decision::Borrowed { offset, .. } => sigmoid(Self::u(t) + offset) + MIN_IMPORTANCE,
            Decision::Head { scale, .. } => MIN_IMPORTANCE + (2.0 - 2.0 * MIN_IMPORTANCE) * sigmoid(scale * Self::u(t)),
        }
    }

    fn projected(&self, ops: &Reference<f64>, rows: std::ops::Range<usize>) -> Projected<Array<f64>> {
        let (kv, group) = (self.kv(), self.group);
        let (mut q, mut k, mut v, mut decide) = (vec![], vec![], vec![], vec![]);
        let channels = |first: f64, last: f64| {
            std::iter::once(first).chain(std::iter::repeat_n(0.0, DIM - 2)).chain(std::iter::once(last))
        };
        for t in rows.clone() {
            for h in 0..kv * group {
                // The group's queries differ; only their mean counts.
                let own = Self::u(t) + 0.7 * ((h % group) as f64 - (group as f64 - 1.0) / 2.0);
                q.extend(channels(AIM, if self.dmc.decision.borrows_channel() { own } else { 0.0 }));
            }
            for g in 0..kv {
                let last = match self.dmc.decision {
                    Decision::Borrowed { scale, offset } => (self.logits[t][g] + offset) / scale,
                    Decision::Head { .. } => 0.0,
                };
                k.extend(channels(1.0 + t as f64 / 10.0, last));
                v.extend((0..DIM).map(|d| f64::from(u8::from(d == t))));
            }
            if let Decision::Head { scale, offset, .. } = self.dmc.decision {
                decide.extend((0..kv).map(|g| (self.logits[t][g] + offset) / scale));
                decide.extend((0..kv).map(|_| Self::u(t)));
            }
        }
        let array = |data: Vec<f64>| ops.array(&[rows.len(), data.len() / rows.len()], data);
        let decide = (!decide.is_empty()).then(|| array(decide));
        Projected { q: array(q), k: array(k), v: array(v), decide, ahead: None, precision: Precision::F32 }
    }

    /// What query i gets from slots: a softmax over keys that stand where the slots say, of means by importance.
    fn output(&self, i: usize, seen: &[Slot]) -> Vec<f64> {
        let mut out = vec![0.0; DIM];
        let mut total = 0.0;
        for slot in seen {
            let mass: f64 = slot.tokens.iter().map(|&t| self.omega(t)).sum();
            let key: f64 = slot.tokens.iter().map(|&t| self.omega(t) * (1.0 + t as f64 / 10.0)).sum::<f64>() / mass;
            let score = AIM * key * (i as f64 - slot.position as f64).cos() / (DIM as f64).sqrt();
            let weight = if self.dmc.log_mass { mass * score.exp() } else { score.exp() };
            slot.tokens.iter().for_each(|&t| out[t] += weight * self.omega(t) / mass);
            total += weight;
        }
        out.iter_mut().for_each(|x| *x /= total);
        out
    }

    /// Runs both attentions and compares outputs with what `want(head, token)` says is seen, and slot counts after
    /// every pass with how many that are.
    fn check(&self, want: impl Fn(usize, usize) -> Vec<Slot>) {
        let (kv, len) = (self.kv(), self.len());
        let heads = Heads { query: kv * self.group, kv, dim: DIM };
        let shape = Shape {
            layers: 1,
            hidden: 1,
            intermediate: 1,
            heads,
            vocab: 1,
            context: 64,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: Scaling::None },
            qkv_bias: false,
            o_bias: false,
            qk_norm: false,
            tied: true,
            decide_outputs: self.dmc.decide_outputs(kv),
            decide_bias: false,
            decide_ahead: false,
        };
        let ops = Reference::<f64>::reference();
        let angles = ops.rope_table(&shape.inv_freq(), shape.context);
        let mut expected = Vec::new();
        for i in 0..len {
            for g in 0..kv {
                let out = self.output(i, &want(g, i));
                (0..self.group).for_each(|_| expected.extend_from_slice(&out));
            }
        }
        let held = |tokens: usize| -> Vec<usize> { (0..kv).map(|g| want(g, tokens - 1).len()).collect() };

        let spans = Spans::of_lengths(&[len]);
        let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans, wanted: None };
        let mut training = Folding::new(&self.dmc, Mode::Hard);
        let out = training.attend(0, &pass, self.projected(&ops, 0..len));
        assert!(worst(out.data(), &expected) < 1e-12, "training sees something else, {self:?}");
        let rates = training.rates[0].data().iter();
        let slots: Vec<usize> = rates.map(|r| (len as f64 * (1.0 - r)).round() as usize).collect();
        assert_eq!(slots, held(len), "slots by the loss's count, {self:?}");

        let policy = FoldingCache::new(self.dmc.clone());
        for sizes in [&[1][..], &[2], &[3, 1], &[len]] {
            let mut pool = PagePool::new(
                &ops,
                CacheShape { layers: 1, heads, rule: policy.rule(), dtype: CacheDType::F32 },
                usize::MAX,
            );
            let mut cache = pool.sequence();
            let mut out = Vec::new();
            for chunk in cut(len, sizes) {
                let spans = Spans::of_chunks([(chunk.len(), chunk.start)]);
                let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans, wanted: None };
                let projected = self.projected(&ops, chunk);
                let mut serving =
                    CachedAttend { policy: &policy, pool: &mut pool, members: vec![Member::of(&mut cache)] };
                out.extend_from_slice(serving.attend(0, &pass, projected).data());
                assert_eq!(cache.held().slots, [held(cache.tokens())], "after {} tokens, {self:?}", cache.tokens());
            }
            assert!(worst(&out, &expected) < 1e-12, "chunks of {sizes:?} see something else, {self:?}");
        }

        // Of as many of the last tokens as are wanted.
        for wanted in 0..=len {
            let shape_of_cache = CacheShape { layers: 1, heads, rule: policy.rule(), dtype: CacheDType::F32 };
            let mut pool = PagePool::new(&ops, shape_of_cache, usize::MAX);
            let mut cache = pool.sequence();
            let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans, wanted: Some(&[wanted]) };
            let mut serving = CachedAttend { policy: &policy, pool: &mut pool, members: vec![Member::of(&mut cache)] };
            let out = serving.attend(0, &pass, self.projected(&ops, 0..len));
            let tail = &expected[expected.len() / len * (len - wanted)..];
            assert_eq!(out.data().len(), tail.len(), "rows of {wanted} tokens, {self:?}");
            assert!(worst(out.data(), tail) < 1e-12, "the last {wanted} tokens see something else, {self:?}");
        }
    }
}

/// Both sources of decisions, with and without masses.
fn variants(alpha: &[u8]) -> Vec<Scene> {
    let mut all = Vec::new();
    for decision in [HEAD, BORROWED] {
        for log_mass in [false, true] {
            all.push(Scene::of(decision, alpha).with(|dmc| dmc.log_mass = log_mass));
        }
    }
    all
}

/// The spec's example (1.11): decisions, slots after each token, and the keys that each row sees.
const ALPHA: [u8; 5] = [0, 1, 0, 1, 0];
const SLOTS: [&[&[usize]]; 5] = [&[&[0]], &[&[0, 1]], &[&[0, 1], &[2]], &[&[0, 1], &[2, 3]], &[&[0, 1], &[2, 3], &[4]]];
const VISIBLE: [&[usize]; 5] = [&[0], &[1], &[1, 2], &[1, 3], &[1, 3, 4]];

fn example(i: usize) -> Vec<Slot> {
    assert_eq!(SLOTS[i].len(), VISIBLE[i].len());
    SLOTS[i].iter().zip(VISIBLE[i]).map(|(tokens, &position)| Slot { tokens: tokens.to_vec(), position }).collect()
}

#[test]
fn the_worked_example_makes_the_slots_of_the_spec() {
    for scene in variants(&ALPHA) {
        scene.check(|_, i| example(i));
    }
}

#[test]
fn never_folding_keeps_a_slot_for_every_token() {
    for scene in variants(&[0; 20]) {
        scene.check(|_, i| (0..=i).map(|t| Slot { tokens: vec![t], position: t }).collect());
    }
}

#[test]
fn always_folding_keeps_one_slot_the_mean_of_its_newest_tokens() {
    for window in [None, Some(1), Some(3), Some(12)] {
        for scene in variants(&[1; 30]) {
            let first = |i: usize| window.map_or(0, |window: usize| (i + 1).saturating_sub(window));
            let all: Vec<usize> = (0..30).collect();
            scene.with(|dmc| dmc.pool_window = window).check(|_, i| slots(&[&all[first(i)..=i]]));
        }
    }
}

#[test]
fn a_window_forgets_the_older_tokens_of_a_segment_and_begins_anew_with_the_next() {
    for scene in variants(&[0, 1, 1, 1, 0, 1, 0]) {
        scene.with(|dmc| dmc.pool_window = Some(3)).check(|_, i| match i {
            0 => slots(&[&[0]]),
            1 => slots(&[&[0, 1]]),
            2 => slots(&[&[0, 1, 2]]),
            3 => slots(&[&[1, 2, 3]]),
            4 => slots(&[&[1, 2, 3], &[4]]),
            5 => slots(&[&[1, 2, 3], &[4, 5]]),
            _ => slots(&[&[1, 2, 3], &[4, 5], &[6]]),
        });
    }
}

#[test]
fn with_a_delay_the_same_folds_happen_later_and_the_ring_counts() {
    for delay in [1, 2, 5, 17] {
        // Tokens that are still in the ring at the end may ask for anything.
        let alpha: Vec<u8> = ALPHA.into_iter().chain(std::iter::repeat_n(1, delay)).collect();
        for scene in variants(&alpha) {
            scene.with(|dmc| dmc.delay = delay).check(|_, i| {
                let ring = (i + 1).saturating_sub(delay)..=i;
                let mut seen = if i >= delay { example(i - delay) } else { vec![] };
                seen.extend(ring.map(|t| Slot { tokens: vec![t], position: t }));
                seen
            });
        }
    }
}

#[test]
fn the_first_token_appends_and_so_does_a_tie() {
    for decision in [HEAD, BORROWED] {
        let mut scene = Scene::of(decision, &[1, 0, 1]);
        scene.logits[1] = vec![0.0];
        scene.check(|_, i| match i {
            0 => slots(&[&[0]]),
            1 => slots(&[&[0], &[1]]),
            _ => slots(&[&[0], &[1, 2]]),
        });
    }
}

#[test]
fn heads_decide_alone_or_by_their_mean() {
    for decision in [HEAD, BORROWED] {
        let mut scene = Scene::of(decision, &[0; 4]);
        scene.logits = vec![vec![-1.0, -1.0], vec![3.0, -1.0], vec![-3.0, 1.0], vec![-1.0, 3.0]];
        scene.check(|g, i| match (g, i) {
            (0, 0) | (1, 0) => slots(&[&[0]]),
            (0, 1) => slots(&[&[0, 1]]),
            (0, 2) => slots(&[&[0, 1], &[2]]),
            (0, _) => slots(&[&[0, 1], &[2], &[3]]),
            (_, 1) => slots(&[&[0], &[1]]),
            (_, 2) => slots(&[&[0], &[1, 2]]),
            _ => slots(&[&[0], &[1, 2, 3]]),
        });
        scene.with(|dmc| dmc.share = Share::Layer).check(|_, i| match i {
            0 => slots(&[&[0]]),
            1 => slots(&[&[0, 1]]),
            2 => slots(&[&[0, 1], &[2]]),
            _ => slots(&[&[0, 1], &[2, 3]]),
        });
    }
}
