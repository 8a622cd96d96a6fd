//! Every family of models can be retrofitted, with what it has beside a plain Llama's weights.

use crate::common::{BORROWED, CONTEXT, HEAD, bits, corpus, settings, steps, tensor, tiny_with, trainer_of};
use kvfold_engine::Engine;
use kvfold_kernels::ops::Spans;
use kvfold_kernels::{FastCpu, Ops};
use kvfold_model::attend::{Folding, Mode};
use kvfold_model::{Checkpoint, Loaded};
use serde_json::{Value, json};

/// A tiny model of each family, with scaled RoPE where families have it.
fn families() -> Vec<Checkpoint> {
    let all = [
        json!({
            "attention_bias": true,
            "rope_scaling": { "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16 }
        }),
        json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": null }),
        json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
            "rope_scaling": { "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12 }
        }),
        json!({ "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3" }),
    ];
    let model = |mut fields: Value| {
        fields["vocab_size"] = 512.into(); // the tokenizer's, so that it can be saved and opened
        tiny_with(&fields)
    };
    all.into_iter().map(model).collect()
}

#[test]
fn every_weight_of_every_family_learns_and_recomputing_changes_nothing() {
    let corpus = corpus(5);
    for base in families() {
        for decision in [HEAD, BORROWED] {
            let mut run = settings(decision, (0, 2, 2));
            run.learning.weight_decay = 0.0;
            let mut trainer = trainer_of(&base, &run);
            let before = bits(&trainer);
            steps(&mut trainer, &corpus, 4);
            for ((name, before), (_, after)) in before.iter().zip(bits(&trainer)) {
                assert!(before.iter().zip(&after).any(|(b, a)| b != a), "{}: {name}", base.config.architecture());
            }
            run.recompute = true;
            let mut again = trainer_of(&base, &run);
            steps(&mut again, &corpus, 4);
            assert!(bits(&trainer) == bits(&again), "{}", base.config.architecture());
        }
    }
}

#[test]
fn a_borrowed_channel_loses_its_biases_with_its_rows() {
    let [_, _, base, _] = &families()[..] else { panic!("four families") };
    let mut trainer = trainer_of(base, &settings(BORROWED, (3, 1, 1)));
    steps(&mut trainer, &corpus(5), 3);
    let dim = base.config.head_dim;
    for part in ["q", "k", "v"] {
        for moment in ["", "m.", "v."] {
            let bias = tensor(&trainer, &format!("{moment}model.layers.1.self_attn.{part}_proj.bias")).to_f32();
            let last: Vec<bool> = bias.chunks(dim).map(|head| head[dim - 1] == 0.0).collect();
            assert!(last.iter().all(|&zero| zero == (part != "v")), "{moment}{part}: {bias:?}");
            assert!(bias.chunks(dim).all(|head| head[..dim - 1].iter().all(|&x| x != 0.0)), "{moment}{part}: {bias:?}");
        }
    }
}

#[test]
fn a_retrofitted_model_of_every_family_is_served_as_it_was_trained() {
    let corpus = corpus(5);
    let dir = tempfile::tempdir().unwrap();
    for base in families() {
        let family = base.config.family;
        for decision in [HEAD, BORROWED] {
            let mut run = settings(decision, (0, 4, 16));
            run.learning.rate = 3e-2;
            let mut trainer = trainer_of(&base, &run);
            steps(&mut trainer, &corpus, 20);
            let path = dir.path().join(format!("{family:?}-{}", decision.borrows_channel()));
            trainer.checkpoint(&base).unwrap().save(&path, &[]).unwrap();
            let model = Checkpoint::open(path.to_str().unwrap()).unwrap();
            assert_eq!(model.config.architecture(), family.retrofitted_architecture());
            assert_eq!((model.config.family, model.config.rope), (family, base.config.rope));

            let ids = &corpus.tokens()[..CONTEXT];
            let loaded = Loaded::new(FastCpu::new(), &model);
            let spans = Spans::of_lengths(&[CONTEXT]);
            let mut whole = Folding::new(loaded.dmc.as_ref().unwrap(), Mode::Hard);
            let want = loaded.pass(&spans).forward(&loaded.weights, ids, &mut whole);
            let mut engine = Engine::new(FastCpu::new(), &model).with_chunk(5);
            let mut sequence = engine.sequence();
            let got = engine.logits(&mut sequence, ids).unwrap();
            let worst = got.iter().zip(loaded.ops.to_host(&want)).fold(0.0_f32, |w, (g, x)| w.max((g - x).abs()));
            assert!(worst < 1e-4, "{family:?}: {worst}");
            let slots: usize = sequence.held().slots.iter().flatten().sum();
            assert!(slots < CONTEXT * 4, "{family:?}: nothing folded, {slots} slots");
        }
    }
}
