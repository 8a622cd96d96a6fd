//! Decisions that land on the ratio that was asked for.

use crate::common::{CONTEXT, HEAD, VOCAB, bits, dmc, settings, tiny, trainer};
use kvfold_kernels::FastCpu;
use kvfold_kernels::dmc::{Decision, Method, Share};
use kvfold_kernels::noise::hash;
use kvfold_kernels::ops::Scope;
use kvfold_retrofit::settings::Calibration;
use kvfold_retrofit::{Corpus, Origin, Settings, Settled, Trainer};

/// A run whose decisions are fitted on a little text, with next to no noise on them.
fn fitted(ratio: f64) -> Settings {
    let mut run = settings(Decision::Head { scale: 4.0, offset: 1.0, bias: true, ahead: true }, (0, 0, 1));
    run.length = CONTEXT;
    run.ratio = ratio;
    run.calibration = Some(Calibration { tokens: 20 * CONTEXT, gain: 1e4 });
    run.learning.rate = 0.0;
    run.batch = 170;
    run
}

/// As many sequences as decisions settle on, so that a step sees what they saw.
fn text() -> Corpus {
    let token = |n: usize| (hash(&[5, n as u64]) % VOCAB as u64).min(hash(&[6, n as u64]) % VOCAB as u64) as u32;
    Corpus::cut((0..170 * CONTEXT).map(token).collect(), CONTEXT).unwrap()
}

fn settle(trainer: &mut Trainer<FastCpu>) -> Settled {
    let mut seen = Vec::new();
    let settled = trainer.settle(&text(), |passes| seen.push(passes)).expect("heads have biases");
    assert_eq!(seen, (1..=settled.passes).collect::<Vec<_>>());
    settled
}

#[test]
fn a_run_folds_what_it_asks_for() {
    for method in [Method::Dmc, Method::Dms] {
        for scope in [Scope::Global, Scope::Layer, Scope::Head] {
            for share in [Share::Head, Share::Layer] {
                for ratio in [1.3, 2.0, 3.0] {
                    let mut run = fitted(ratio);
                    run.pressure.scope = scope;
                    let rules = dmc(&mut run);
                    (rules.method, rules.share) = (method, share);
                    (rules.pool_window, rules.log_mass) = (None, method == Method::Dmc);
                    let mut trainer = trainer(&run);
                    trainer.calibrate(&text(), |_| ()).unwrap();
                    let settled = settle(&mut trainer);
                    let what = format!("{method:?}, {scope:?}, {share:?}, {ratio}: {settled:?}");
                    assert!((settled.after / ratio - 1.0).abs() <= 0.005, "{what}");
                    // As training counts folds.
                    let report = trainer.step(&text()).unwrap();
                    assert!((report.ratio / settled.after - 1.0).abs() < 4e-3, "{what}: {}", report.ratio);
                    if scope == Scope::Head {
                        let heads: Vec<f64> = trainer.heads().iter().flatten().copied().collect();
                        assert!(heads.iter().all(|head| (head / ratio - 1.0).abs() < 0.05), "{what}: {heads:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn heads_without_biases_stay_as_they_are() {
    let mut trainer = trainer(&Settings { calibration: None, ..settings(HEAD, (0, 0, 1)) });
    let before = bits(&trainer);
    assert_eq!(trainer.settle(&text(), |_| panic!("decisions are taken")), None);
    assert_eq!(bits(&trainer), before);
}

/// Its decisions are an order of tokens, and a ratio is where it is cut.
#[test]
fn a_fitted_model_moves_to_another_ratio() {
    let mut trainer = trainer(&fitted(3.0));
    trainer.calibrate(&text(), |_| ()).unwrap();
    settle(&mut trainer);
    let model = trainer.checkpoint(&tiny()).unwrap();
    for ratio in [1.5, 2.0, 4.0] {
        let (origin, method) = Origin::of(&model).unwrap();
        let mut run = Settings { method, calibration: None, ..fitted(ratio) }.beginning_at(origin);
        run.stages.hold = 0;
        let mut moved = Trainer::from_model(FastCpu::new(), &tiny(), &model, run).unwrap();
        let settled = settle(&mut moved);
        assert!(
            (settled.before / 3.0 - 1.0).abs() < 0.01 && (settled.after / ratio - 1.0).abs() <= 0.005,
            "{settled:?}"
        );
        let saved = moved.checkpoint(&tiny()).unwrap();
        assert_eq!(saved.config.compression.unwrap().ratio, ratio);
        let others = |model: &kvfold_model::Checkpoint| {
            let mut tensors = model.tensors.clone();
            tensors.retain(|name, _| !name.contains("decide_proj.bias"));
            tensors
        };
        assert_eq!(others(&moved.checkpoint(&tiny()).unwrap()), others(&model));
    }
}
