//! Promise I6, the whole model: forward, losses and every gradient against an independent implementation (`oracle/`).

use kvfold_autograd::Tape;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::ops::{Goal, Heads, Hinge, KlDirection, NO_TARGET, Over, Predictions, Pull, Scope, Spans};
use kvfold_kernels::{Array, FastCpu, Ops, Reference};
use kvfold_model::attend::{Folding, Mode, Noise, Plain};
use kvfold_model::block::Pass;
use kvfold_model::rope::{Rope, Scaling};
use kvfold_model::shape::Shape;
use kvfold_model::weights::Weights;
use kvfold_model::{Checkpoint, Loaded};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::PathBuf;

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(view.dtype(), Dtype::F64, "{name}");
    view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<usize> {
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(view.dtype(), Dtype::I64, "{name}");
    view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as usize).collect()
}

fn ids(file: &SafeTensors<'_>) -> Vec<u32> {
    integers(file, "tokens").into_iter().map(|id| id as u32).collect()
}

/// Largest difference relative to the larger of 1 and the golden's own size.
fn worst(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, w)| (g - w).abs() / w.abs().max(1.0)).fold(0.0, f64::max)
}

#[test]
fn the_embedded_model_computes_the_golden_logits() {
    let bytes = golden("stories260k_dense.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("a golden");
    let checkpoint = Checkpoint::open("stories260k").expect("the embedded model");
    let (ids, want) = (ids(&file), floats(&file, "logits"));
    let spans = Spans::of_lengths(&[ids.len()]);

    let exact = Loaded::new(Reference::<f64>::reference(), &checkpoint);
    let logits = exact.pass(&spans).forward(&exact.weights, &ids, &mut Plain);
    assert!(worst(logits.data(), &want) < 1e-10, "f64: {}", worst(logits.data(), &want));

    let fast = Loaded::new(FastCpu::new(), &checkpoint);
    let logits = fast.pass(&spans).forward(&fast.weights, &ids, &mut Plain);
    let logits: Vec<f64> = logits.data().iter().map(|&x| f64::from(x)).collect();
    assert!(worst(&logits, &want) < 2e-5, "f32: {}", worst(&logits, &want));
}

#[derive(Deserialize)]
struct Case {
    #[serde(flatten)]
    dmc: Dmc_,
    tau: f64,
    loss: String,
    hinge: HingeCase,
}

// `Dmc` denies unknown fields, which flattening cannot honour.
#[derive(Deserialize)]
struct Dmc_ {
    #[serde(default)]
    method: kvfold_kernels::dmc::Method,
    decision: kvfold_kernels::dmc::Decision,
    delay: usize,
    pool_window: Option<usize>,
    log_mass: bool,
    share: kvfold_kernels::dmc::Share,
}

#[derive(Deserialize)]
struct HingeCase {
    scope: Scope,
    over: Over,
    weight: f64,
    ratio: f64,
}

const TINY: Shape = Shape {
    layers: 2,
    hidden: 16,
    intermediate: 24,
    heads: Heads { query: 4, kv: 2, dim: 6 },
    vocab: 32,
    context: 64,
    norm_eps: 1e-5,
    rope: Rope { theta: 10_000.0, scaling: Scaling::None },
    qkv_bias: false,
    o_bias: false,
    qk_norm: false,
    tied: false,
    decide_outputs: 0,
    decide_bias: false,
    decide_ahead: false,
};

fn dmc_case(name: &str) {
    let bytes = golden(&format!("dmc_{name}.safetensors"));
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a golden");
    let metadata: &HashMap<String, String> = header.metadata().as_ref().expect("metadata");
    let case: Case = serde_json::from_str(&metadata["case"]).expect("a case");
    let file = SafeTensors::deserialize(&bytes).expect("a golden");
    let Dmc_ { method, decision, delay, pool_window, log_mass, share } = case.dmc;
    let dmc = Dmc { method, decision, delay, sinks: 0, pool_window, log_mass, share };
    let decide_outputs = dmc.decide_outputs(TINY.heads.kv);
    let shape = Shape { decide_outputs, decide_ahead: dmc.decide_ahead(), ..TINY };
    let kv = shape.heads.kv;

    let ops = Reference::<f64>::reference();
    let ids = ids(&file);
    let lengths = integers(&file, "lengths");
    let spans = Spans::of_lengths(&lengths);
    let weights: Weights<Array<f64>> =
        Weights::build(&shape, |name, dims| Ok::<_, std::convert::Infallible>(ops.array(dims, floats(&file, name))))
            .unwrap_or_else(|e| match e {});
    let angles = ops.rope_table(&shape.inv_freq(), shape.context);
    let check = |what: &str, got: &[f64], want: &[f64], tolerance: f64| {
        let error = worst(got, want);
        assert!(error < tolerance, "{name}: {what} is off by {error:e}");
    };

    // Evaluation: hard decisions, no noise.
    let pass = Pass { ops: &ops, shape: &shape, angles: &angles, spans: &spans, wanted: None };
    let mut hard = Folding::new(&dmc, Mode::Hard);
    let logits = pass.forward(&weights, &ids, &mut hard);
    check("eval_logits", logits.data(), &floats(&file, "eval_logits"), 1e-10);
    let slots: Vec<usize> = hard
        .rates
        .iter()
        .flat_map(|rates| rates.data().chunks(kv).zip(&lengths).collect::<Vec<_>>())
        .flat_map(|(rates, &len)| rates.iter().map(move |r| (len as f64 * (1.0 - r)).round() as usize))
        .collect();
    assert_eq!(slots, integers(&file, "eval_slots"), "{name}: eval_slots");

    // Training: relaxed decisions with the golden's noise.
    let tape = Tape::new(ops.clone());
    let vars = weights.map(&shape, |w| tape.param(w.clone()));
    let angles = tape.rope_table(&shape.inv_freq(), shape.context);
    let mut noise = floats(&file, "noise");
    if dmc.share == kvfold_kernels::dmc::Share::Layer {
        noise.chunks_mut(kv).for_each(|row| row.fill(row[0]));
    }
    let noise =
        noise.chunks(ids.len() * kv).map(|n| kvfold_autograd::Var::constant(ops.array(&[ids.len(), kv], n.to_vec())));
    let mode = Mode::Soft { temperature: case.tau, noise: Noise::Given(noise.collect()) };
    let pass = Pass { ops: &tape, shape: &shape, angles: &angles, spans: &spans, wanted: None };
    let mut soft = Folding::new(&dmc, mode);
    let x = pass.hidden(&vars, &ids, &mut soft);
    let logits = pass.logits(&vars, &x);
    check("logits", logits.value.data(), &floats(&file, "logits"), 1e-10);
    let rates: Vec<f64> = soft.rates.iter().flat_map(|r| r.value.data().to_vec()).collect();
    check("stat", &rates, &floats(&file, "stat"), 1e-12);

    let mut targets = ids[1..].to_vec();
    targets.push(NO_TARGET);
    spans.iter().for_each(|span| targets[span.start + span.len - 1] = NO_TARGET);
    // Logits of the golden, as the product of themselves and the identity.
    let constant = kvfold_autograd::Var::constant;
    let teacher_logits = constant(ops.array(&[ids.len(), shape.vocab], floats(&file, "teacher_logits")));
    let identity = (0..shape.vocab * shape.vocab).map(|i| f64::from(i % (shape.vocab + 1) == 0)).collect();
    let identity = constant(ops.array(&[shape.vocab, shape.vocab], identity));
    let normed = pass.normed(&vars, &x);
    let predicted = Predictions { x: &normed, w: vars.unembed() };
    let like_teacher = |direction| Goal::Teacher(Predictions { x: &teacher_logits, w: &identity }, direction);
    let HingeCase { scope, over, weight, ratio } = case.hinge;
    let losses = [
        ("ce", tape.prediction_loss(predicted, Goal::Tokens(&targets))),
        ("kl_forward", tape.prediction_loss(predicted, like_teacher(KlDirection::Forward))),
        ("kl_reverse", tape.prediction_loss(predicted, like_teacher(KlDirection::Reverse))),
        (
            "hinge",
            tape.hinge(
                &soft.rates,
                &spans,
                Hinge { target: 1.0 - 1.0 / ratio, scope, over, pull: Pull::Up, stated_at: None },
            ),
        ),
    ];
    for (what, loss) in &losses {
        check(what, loss.value.data(), &floats(&file, what), 1e-10);
    }
    let [.., (_, hinge)] = &losses;
    let (_, task) = losses.iter().find(|(what, _)| *what == case.loss).expect("a known loss");
    let total = tape.add(task, hinge, weight);
    check("total", total.value.data(), &floats(&file, "total"), 1e-10);

    let grads = tape.backward(&total);
    for ((name, _), var) in Weights::<()>::expected(&shape).iter().zip(vars.list()) {
        let want = floats(&file, &format!("grad.{name}"));
        let got = grads.get(var).map_or_else(|| vec![0.0; want.len()], |g| g.data().to_vec());
        check(&format!("gradient of {name}"), &got, &want, 1e-9);
    }
}

#[test]
fn borrowed_channel_folding_at_once() {
    dmc_case("borrowed");
}

#[test]
fn borrowed_channel_windowed_with_masses() {
    dmc_case("borrowed_window");
}

#[test]
fn decision_head_with_a_delay_and_masses() {
    dmc_case("head_delay");
}

#[test]
fn decision_head_with_a_delay_and_a_window() {
    dmc_case("head_delay_window");
}

#[test]
fn decisions_shared_by_a_layer() {
    dmc_case("head_layer");
}

#[test]
fn decisions_that_look_back() {
    dmc_case("head_ahead");
    dmc_case("dms_ahead");
}

#[test]
fn evicting_by_a_head() {
    dmc_case("dms_head");
}

#[test]
fn evicting_by_a_borrowed_channel_of_the_first_queries() {
    dmc_case("dms_borrowed");
}
