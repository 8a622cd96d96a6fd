//! `kvfold demo`: the whole path on the embedded model, and its receipt.

use super::measure::measure;
use super::papers::{Papers, decision, method};
use super::train::{SelfText, self_text, train};
use crate::cli::DemoArgs;
use crate::error::AppError;
use crate::output;
use kvfold_engine::{Engine, Options, Sampler, Stop, generate};
use kvfold_eval::{Workload, cut, decode_speed};
use kvfold_kernels::FastCpu;
use kvfold_model::shape::Shape;
use kvfold_model::{Checkpoint, embedded, ensure_absent};
use kvfold_report::receipt::{self, Memory, Speed, Story};
use kvfold_report::{Receipt, format, render};
use kvfold_retrofit::settings::{STEPS, Text, default_dmc};
use kvfold_retrofit::{Corpus, Settings, Trainer};
use std::ops::ControlFlow;

/// Stories that the retrofit never sees, for the evaluation: a slice of TinyStories, see `data/README.md`.
const HELD_OUT: &str = include_str!("../../../../data/tinystories_heldout.txt");

/// What both models continue.
const PROMPT: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in the";

const RATIO: f64 = 4.0;
const TEXTS: usize = 256;
const NEW_TOKENS: usize = 160;

/// Sequences decoded at once when speed is measured, and where in their context.
const SPEED_BATCH: usize = 16;
const SPEED: Workload = Workload { prompt: 384, decode: 64, rounds: 5 };

pub(crate) fn run(args: &DemoArgs) -> Result<(), AppError> {
    if let Some(out) = &args.out {
        ensure_absent(out)?;
    }
    if let Some(path) = &args.json {
        output::ensure_writable(path)?;
    }
    let name = embedded::STORIES260K;
    let base = Checkpoint::open(name)?;
    let shape = Shape::of(&base.config);
    let mut original = Engine::new(FastCpu::new(), &base);

    output::note(&format!(
        "{name}: {} parameters, context {}; retrofitting to {RATIO}x",
        format::exact(shape.parameters() as u64),
        shape.context
    ));
    let wanted = SelfText { texts: TEXTS, length: shape.context, seed: args.seed };
    let texts = self_text(&mut original, &base, wanted, false)?;
    let corpus = Corpus::cut(texts.into_iter().flatten().collect(), shape.context)?;
    let dmc = default_dmc();
    let settings = Settings {
        seed: args.seed,
        text: Text::Own { samples: TEXTS },
        ..Settings::recipe(&shape, dmc.clone(), RATIO, STEPS)
    };
    let mut trainer = Trainer::new(FastCpu::new(), &base, settings)?;
    let trained = train(&mut trainer, &corpus, Vec::new(), false, |_, _, _| Ok(()))?;
    let model = trainer.checkpoint(&base)?;
    let mut compressed = Engine::new(FastCpu::new(), &model);

    let tokens = base.tokenizer.encode(HELD_OUT, false)?;
    let windows = cut(&tokens, shape.context, None)?;
    let (memory, quality) = measure((&mut original, &mut compressed), &windows, false)?;
    let speed = speed((&mut original, &mut compressed), &windows, &memory, &shape)?;
    let story = Story {
        prompt: PROMPT.to_owned(),
        dense: continued(&mut original, &base)?,
        compressed: continued(&mut compressed, &base)?,
    };
    let papers = Papers {
        base: &base,
        settings: trainer.settings(),
        trained: &trained,
        memory: &memory,
        quality: &quality,
        text: &[],
    };
    let receipt = Receipt {
        schema: receipt::Schema::V1,
        kvfold_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: output::COMMIT.to_owned(),
        command: output::command_line(),
        date: output::now(),
        machine: output::machine(),
        model: name.to_owned(),
        seed: args.seed,
        method: method(&trainer.settings().method),
        delay: dmc.delay as u64,
        sinks: dmc.sinks as u64,
        decision: decision(dmc.decision),
        memory: memory.clone(),
        quality,
        tokens_per_second: speed,
        training: Some(papers.training()),
        story: Some(story),
    };
    if let Some(out) = &args.out {
        papers.save(&model, (out, out), &[("receipt.json", receipt.to_json().as_bytes())])?;
    }
    if let Some(path) = &args.json {
        output::file(path, &receipt.to_json())?;
    }
    output::line(&render(&receipt, &output::style()))
}

/// Decoding speed of both near the end of their context, and what reading fewer bytes could gain at most.
fn speed(
    (original, compressed): (&mut Engine<FastCpu>, &mut Engine<FastCpu>),
    windows: &[&[u32]],
    memory: &Memory,
    shape: &Shape,
) -> Result<Speed, AppError> {
    let windows = &windows[..SPEED_BATCH.min(windows.len())];
    let bar = output::bar("timing decode", 2 * SPEED.rounds, "runs", false);
    let rates = decode_speed(&mut [original, compressed], windows, SPEED, || bar.inc(1))?;
    bar.finish_and_clear();
    let batch = windows.len() as u64;
    let weights = (shape.parameters() * size_of::<f32>()) as u64;
    let ceiling = Speed::byte_ceiling(weights, batch * memory.dense_kv_bytes, batch * memory.kv_bytes);
    Ok(Speed { dense: rates[0], compressed: rates[1], batch, ceiling: Some(ceiling) })
}

/// What a model makes of the prompt, greedily.
fn continued(engine: &mut Engine<FastCpu>, base: &Checkpoint) -> Result<String, AppError> {
    let prompt = base.tokenizer.encode(PROMPT, true)?;
    let stop = Stop { max_new_tokens: NEW_TOKENS, at: base.stop_token_ids()?, ..Stop::default() };
    let generation =
        generate(engine, &prompt, &Options { sampler: Sampler::GREEDY, stop }, |_| ControlFlow::Continue(()))?;
    let mut stream = base.tokenizer.stream_after(&prompt)?;
    let mut text = String::new();
    for &token in &generation.tokens {
        text.extend(stream.push(token)?);
    }
    text.extend(stream.finish()?);
    Ok(text)
}
