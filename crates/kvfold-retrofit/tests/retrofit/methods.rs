//! The other methods: DMS, which evicts, and GQA, which merges heads. What they share with DMC is tested elsewhere.

use crate::common::{BORROWED, CONTEXT, HEAD, bits, corpus, dmc, settings, steps, tensor, tiny, trainer};
use kvfold_engine::Engine;
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{self, Borrows, Decision, Dmc};
use kvfold_model::shape::Shape;
use kvfold_model::{Checkpoint, Config};
use kvfold_retrofit::schedule::Stage;
use kvfold_retrofit::settings::{Loss, Method};
use kvfold_retrofit::{Corpus, RetrofitError, Settings, Trainer, mean_pooled};
use kvfold_tensor::HostTensor;

/// A run of DMS.
fn evicting(decision: Decision, stages: (u64, u64, u64)) -> Settings {
    let mut run = settings(decision, stages);
    let how = dmc(&mut run);
    *how = Dmc { method: dmc::Method::Dms, pool_window: None, log_mass: false, ..how.clone() };
    run
}

/// A run that leaves one of the two KV heads.
fn merging(hold: u64) -> Settings {
    Settings { method: Method::Gqa { kv_heads: 1 }, ..settings(HEAD, (0, 0, hold)) }
}

fn rows(tensor: &HostTensor) -> Vec<Vec<f32>> {
    tensor.to_f32().chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
}

fn nothing(row: &[f32]) -> bool {
    row.iter().all(|&x| x == 0.0)
}

// ---- DMS ----

#[test]
fn a_head_that_never_evicts_starts_as_the_original_model() {
    for delay in [0, 4, 16] {
        let mut run = evicting(Decision::Head { scale: 4.0, offset: 1e4, bias: false, ahead: false }, (0, 2, 0));
        dmc(&mut run).delay = delay;
        (run.ratio, run.temperature) = (1.4, 0.1);
        let report = trainer(&run).step(&corpus(5)).unwrap();
        assert!(report.task_loss.abs() < 1e-6, "{delay}: {}", report.task_loss);
        assert_eq!(report.ratio, 1.0);
    }
}

#[test]
fn a_head_has_logits_alone_and_all_of_them_learn() {
    let mut trainer = trainer(&evicting(HEAD, (0, 2, 2)));
    steps(&mut trainer, &corpus(5), 1);
    for layer in 0..2 {
        let moments = rows(&tensor(&trainer, &format!("m.model.layers.{layer}.self_attn.decide_proj.weight")));
        assert_eq!(moments.len(), 2, "one per KV head");
        assert!(!moments.iter().any(|row| nothing(row)), "layer {layer}: {moments:?}");
    }
}

#[test]
fn what_is_borrowed_is_a_channel_of_each_groups_first_query() {
    let corpus = corpus(5);
    // Four query heads in two groups, head dim 8: of queries rows 7 and 23, of keys none.
    let mut zeroed = trainer(&evicting(BORROWED, (3, 2, 0)));
    let key = |trainer: &Trainer<FastCpu>| rows(&tensor(trainer, "model.layers.0.self_attn.k_proj.weight"));
    let query = |trainer: &Trainer<FastCpu>| rows(&tensor(trainer, "model.layers.0.self_attn.q_proj.weight"));
    let reports = steps(&mut zeroed, &corpus, 2);
    assert!(reports.iter().all(|report| report.stage == Stage::Zeroing));
    assert!(!query(&zeroed).iter().any(|row| nothing(row)), "weights are not touched before the end");
    steps(&mut zeroed, &corpus, 3);
    for (n, row) in query(&zeroed).iter().enumerate() {
        assert_eq!(nothing(row), [7, 23].contains(&n), "query row {n}");
    }
    assert!(!key(&zeroed).iter().any(|row| nothing(row)));
    let report = zeroed.step(&corpus).unwrap();
    assert_eq!(report.stage, Stage::Ramp);
    assert!([7, 23].iter().all(|&n| !nothing(&query(&zeroed)[n])), "they decide from here on, and learn");
}

#[test]
fn the_ratio_follows_its_target_and_serving_evicts_as_training_did() {
    let stories = Checkpoint::open("stories260k").unwrap();
    let text = "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog. ";
    let length = 64;
    let corpus = Corpus::cut(stories.tokenizer.encode(&text.repeat(40), false).unwrap(), length).unwrap();
    for (decision, stages) in [
        (Decision::Head { scale: 4.0, offset: 5.0, bias: false, ahead: false }, (0, 40, 20)),
        (Decision::Borrowed { scale: 20.0, offset: 5.0 }, (10, 40, 20)),
    ] {
        let mut run = evicting(decision, stages);
        dmc(&mut run).delay = 8;
        (run.length, run.batch, run.temperature) = (length, 4, 0.1);
        run.learning.decide_factor = 10.0;
        let mut trainer = Trainer::new(FastCpu::new(), &stories, run.clone()).unwrap();
        let reports = steps(&mut trainer, &corpus, run.stages.total());
        let late = &reports[reports.len() - 10..];
        let late = late.iter().map(|report| report.ratio).sum::<f64>() / late.len() as f64;
        // The hinge is one-sided: nothing pulls back what overshoots.
        assert!((1.9..3.4).contains(&late), "{decision:?} trained towards 2, at {late}");

        let mut engine = Engine::new(FastCpu::new(), &trainer.checkpoint(&stories).unwrap());
        assert_eq!(engine.policy().name(), "dms");
        let mut held = |n: usize| {
            let mut sequence = engine.sequence();
            engine.logits(&mut sequence, corpus.sequence(n)).unwrap();
            sequence.held().slots.concat()
        };
        let slots: Vec<usize> = (0..8).flat_map(&mut held).collect();
        let hard = (length * slots.len()) as f64 / slots.iter().sum::<usize>() as f64;
        assert!((hard / late - 1.0).abs() < 0.25, "{decision:?} trained at {late}, served at {hard}");
    }
}

#[test]
fn a_state_of_dms_is_smaller_than_one_of_dmc_by_the_sums() {
    let bytes = |run: &Settings| {
        let mut engine = Engine::new(FastCpu::new(), &trainer(run).checkpoint(&tiny()).unwrap());
        let mut sequence = engine.sequence();
        engine.logits(&mut sequence, &[1; 20]).unwrap();
        engine.usage(&sequence).state_bytes
    };
    let mut folding = settings(HEAD, (0, 1, 0));
    dmc(&mut folding).pool_window = None;
    // A key, a value, a mass and a length less, in f32.
    assert_eq!(bytes(&folding) - bytes(&evicting(HEAD, (0, 1, 0))), (2 * 8 + 2) * 4);
}

#[test]
fn settings_of_means_are_refused() {
    let refused = |spoil: fn(&mut Dmc), wanted: &str| {
        let mut run = evicting(HEAD, (0, 1, 1));
        spoil(dmc(&mut run));
        let message = run.validate(&Shape::of(&tiny().config)).unwrap_err().to_string();
        assert!(message.starts_with(wanted), "{message}");
    };
    refused(|dmc| dmc.pool_window = Some(5), "`pool_window` is 5; expected none: DMS");
    refused(|dmc| dmc.log_mass = true, "`log_mass` is true; expected false: DMS");
}

// ---- GQA ----

#[test]
fn a_student_starts_as_the_mean_of_its_heads_and_ends_as_a_plain_model() {
    let base = tiny();
    let mut trainer = trainer(&merging(3));
    let start = trainer.checkpoint(&base).unwrap();
    let pooled = mean_pooled(&base, 1);
    assert_eq!(pooled.len(), 2 * base.config.num_hidden_layers);
    for (name, tensor) in &start.tensors {
        assert_eq!(Some(tensor), pooled.get(name).or(base.tensors.get(name)), "{name}");
    }
    assert_eq!(start.config.num_key_value_heads, 1);
    let key = "model.layers.1.self_attn.k_proj.weight";
    let (before, after) = (base.tensors[key].to_f32(), start.tensors[key].to_f32());
    assert_eq!(after.len() * 2, before.len());
    for (n, &mean) in after.iter().enumerate() {
        assert!((mean - (before[n] + before[after.len() + n]) / 2.0).abs() < 1e-6);
    }

    let reports = steps(&mut trainer, &corpus(5), 3);
    assert!(
        reports.iter().all(|r| r.stage == Stage::Hold && r.ratio == 2.0 && r.hinge == 0.0 && r.loss == r.task_loss)
    );
    assert!(reports[0].task_loss > 1e-3, "merged heads are another model than the teacher");
    let model = trainer.checkpoint(&base).unwrap();
    assert_eq!((model.config.architecture(), model.config.num_key_value_heads), ("LlamaForCausalLM", 1));
    assert_eq!((model.config.compression.is_none(), model.config.num_attention_heads), (true, 4));
    let config = Config::parse(model.config.to_json().as_bytes(), "back").unwrap();
    assert_eq!(config, model.config, "read as the plain model that it is");

    let held = |model: &Checkpoint| {
        let mut engine = Engine::new(FastCpu::new(), model);
        let mut sequence = engine.sequence();
        engine.logits(&mut sequence, &[1; CONTEXT]).unwrap();
        engine.usage(&sequence).bytes()
    };
    assert_eq!(held(&base), 2 * held(&model), "half of the heads, half of the bytes");
}

#[test]
fn merging_heads_that_are_alike_changes_nothing() {
    let mut base = tiny();
    for (name, tensor) in &mut base.tensors {
        if name.contains("k_proj") || name.contains("v_proj") {
            let half = tensor.bytes().len() / 2;
            tensor.bytes_mut().copy_within(..half, half);
        }
    }
    let mut trainer = Trainer::new(FastCpu::new(), &base, merging(1)).unwrap();
    let report = trainer.step(&corpus(5)).unwrap();
    assert!(report.task_loss.abs() < 1e-6, "{}", report.task_loss);
}

#[test]
fn training_brings_a_student_back_to_its_teacher() {
    let corpus = corpus(5);
    for loss in [merging(1).loss, Loss::Lm] {
        let mut trainer = trainer(&Settings { loss, ..merging(40) });
        let reports = steps(&mut trainer, &corpus, 40);
        let mean = |reports: &[kvfold_retrofit::StepReport]| {
            reports.iter().map(|r| r.task_loss).sum::<f64>() / reports.len() as f64
        };
        let (first, last) = (mean(&reports[..5]), mean(&reports[35..]));
        assert!(last < 0.9 * first, "{loss:?}: {first} {last}");
    }
}

#[test]
fn a_student_goes_on_from_its_state_to_the_bit() {
    let corpus = corpus(5);
    let run = merging(4);
    let (mut whole, mut first, mut second) = (trainer(&run), trainer(&run), trainer(&run));
    steps(&mut whole, &corpus, 4);
    steps(&mut first, &corpus, 2);
    let state: std::collections::BTreeMap<String, HostTensor> = first.state().into_iter().collect();
    second
        .restore(2, |name, dims| {
            assert_eq!(state[name].shape(), dims, "{name}");
            Ok(&state[name])
        })
        .unwrap();
    steps(&mut second, &corpus, 4);
    assert_eq!(bits(&second), bits(&whole));
}

#[test]
fn heads_that_cannot_be_merged_are_refused() {
    let base = tiny();
    let refused = |kv_heads: usize, ratio: f64, wanted: &str| {
        let run = Settings { method: Method::Gqa { kv_heads }, ratio, ..merging(1) };
        let error = Trainer::new(FastCpu::new(), &base, run).unwrap_err();
        assert!(matches!(error, RetrofitError::Setting { .. }), "{error}");
        assert!(error.to_string().starts_with(wanted), "{error}");
    };
    refused(0, 2.0, "`kv_heads` is 0; expected a divisor of 2");
    refused(2, 1.0, "`kv_heads` is 2; expected a divisor of 2, the model's KV heads, below it");
    refused(3, 2.0, "`kv_heads` is 3");
    refused(1, 3.0, "`ratio` is 3; expected 2, since 1 of 2 KV heads are left");
    assert_eq!(merging(1).method.borrows(), Borrows::Nothing);
}
