//! `kvfold bench model`.

use super::tokens_of;
use crate::cli::{ModelArgs, ModelBenchArgs};
use crate::error::AppError;
use crate::output;
use kvfold_engine::{Engine, EngineError};
use kvfold_eval::{Batch, Caches, Load, Machine, Others, Rates, StepCost, Throughput, decode, prefill};
use kvfold_kernels::FastCpu;
use kvfold_kernels::noise::hash;
use kvfold_kernels::ops::Precision;
use kvfold_report::receipt;
use serde::Serialize;

/// Tokens of a prompt and depth of decoding when the user does not say.
const TOKENS: usize = 512;
/// Sequences that are decoded together when the user does not say.
const SEQUENCES: usize = 8;

#[derive(Serialize)]
struct Output {
    schema: &'static str,
    kvfold_version: &'static str,
    commit: &'static str,
    date: String,
    host: receipt::Machine,
    machine: Machine,
    models: Vec<Model>,
    text: Option<String>,
    seed: Option<u64>,
    rounds: usize,
    tokens: usize,
    prefill: Vec<Row>,
    decode: Vec<Row>,
    others: Option<Others>,
    command: String,
}

/// A model that was measured.
#[derive(Serialize)]
struct Model {
    name: String,
    precision: Precision,
    policy: &'static str,
    compresses: bool,
    /// Bytes of the weights that a step reads.
    weight_bytes: usize,
    /// Type of the cache's slots.
    cache: &'static str,
    /// Bytes of a page of the full cache.
    page_bytes: usize,
}

/// A batch and what each model made of it.
#[derive(Serialize)]
struct Row {
    sequences: usize,
    /// Tokens in each cache before the first that was measured, and after the last.
    from: usize,
    to: usize,
    models: Vec<Cell>,
}

/// One model's numbers of a row.
#[derive(Serialize)]
struct Cell {
    tokens_per_second: Rates,
    /// Share of the machine's peak that the products with weights alone come to.
    products_of_peak: f64,
    cache_bytes: f64,
    logical_ratio: f64,
    physical_ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Bytes>,
}

/// What a step of decoding reads, and what that allows.
#[derive(Serialize)]
struct Bytes {
    per_step: f64,
    /// Tokens per second if nothing but reading took time.
    ceiling: f64,
    /// Share of the ceiling that was reached.
    reached: f64,
    /// How many times faster than with full caches, if nothing but reading took time.
    #[serde(skip_serializing_if = "Option::is_none")]
    speed_up_ceiling: Option<f64>,
}

/// The engines, and what they cost to run.
#[derive(Default)]
struct Bench {
    engines: Vec<Engine<FastCpu>>,
    costs: Vec<StepCost>,
    models: Vec<Model>,
    /// The text's tokens, as the first model has them.
    text: Option<Vec<u32>>,
}

/// Tokens for each sequence of a batch.
type Windows = (Batch, Vec<Vec<u32>>);

pub(crate) fn run(args: &ModelBenchArgs) -> Result<(), AppError> {
    let (rounds, tokens) = (args.rounds as usize, args.tokens as usize);
    let after = rounds * tokens;
    let mut bench = Bench::open(args)?;
    let (prompts, depths) = rows(args, bench.context(), after)?;
    let source = Source { args, text: bench.text.take(), vocab: bench.vocabulary(args)? };
    let prompts = source.windows(prompts, 0)?;
    let depths = source.windows(depths, after)?;

    let before = Load::now();
    let machine = Machine::measure();
    let runs = bench.engines.len() * (rounds * prompts.len() + (rounds + 1) * depths.len());
    let bar = output::bar("measuring", runs, "runs", args.json);
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for (batch, windows) in prompts {
        let measured = prefill(&mut bench.engines(), &slices(&windows), (batch, rounds), || bar.inc(1))?;
        prefills.push(bench.row(&machine, batch, None, measured));
    }
    for (batch, windows) in depths {
        let measured = decode(&mut bench.engines(), &slices(&windows), batch, (tokens, rounds), || bar.inc(1))?;
        decodes.push(bench.row(&machine, batch, Some(after), measured));
    }
    bar.finish_and_clear();
    let others = before.zip(Load::now()).map(|(before, after)| after.others_since(&before));
    let result = Output {
        schema: "kvfold.bench/1",
        kvfold_version: env!("CARGO_PKG_VERSION"),
        commit: output::COMMIT,
        date: output::now(),
        host: output::machine(),
        machine,
        models: bench.models,
        text: args.text.as_ref().map(|path| path.display().to_string()),
        seed: args.text.is_none().then_some(args.seed),
        rounds,
        tokens,
        prefill: prefills,
        decode: decodes,
        others,
        command: output::command_line(),
    };
    if args.json {
        return output::json(&result);
    }
    if let Some(warning) = others.and_then(|others| others.warning()) {
        output::note(&format!("kvfold: {warning}"));
    }
    output::line(&table(&result))
}

/// The model, and the one that it is measured against.
fn models(args: &ModelBenchArgs) -> Vec<ModelArgs> {
    let against = args.against.iter().map(|model| ModelArgs {
        model: model.clone(),
        delta: None,
        precision: args.against_precision,
        cache: args.against_cache,
    });
    std::iter::once(args.model.clone()).chain(against).collect()
}

/// The rows to measure, of which `after` tokens follow a depth; those that are too long for the context are refused before
/// anything is measured.
fn rows(args: &ModelBenchArgs, context: usize, after: usize) -> Result<(Vec<Batch>, Vec<Batch>), AppError> {
    let (mut prompts, mut depths) = (args.prefill.clone(), args.decode.clone());
    if prompts.is_empty() && depths.is_empty() {
        prompts.push(Batch { sequences: 1, tokens: TOKENS.min(context) });
        depths.push(Batch { sequences: 1, tokens: 0 });
        depths.push(Batch { sequences: SEQUENCES, tokens: TOKENS.min(context.saturating_sub(after)) });
    }
    let longest = prompts.iter().map(|batch| batch.tokens).chain(depths.iter().map(|batch| batch.tokens + after)).max();
    match longest {
        Some(tokens) if tokens > context => Err(EngineError::TooLong { tokens, context }.into()),
        _ => Ok((prompts, depths)),
    }
}

impl Bench {
    /// Loads the models, and tokenises the text.
    fn open(args: &ModelBenchArgs) -> Result<Self, AppError> {
        let mut bench = Self::default();
        for model in models(args) {
            let checkpoint = model.open()?;
            if let (true, Some(path)) = (bench.text.is_none(), &args.text) {
                bench.text = Some(tokens_of(path, &checkpoint.tokenizer)?);
            }
            bench.add(&model, model.engine(&checkpoint), model.precision(&checkpoint));
        }
        Ok(bench)
    }

    fn add(&mut self, model: &ModelArgs, engine: Engine<FastCpu>, precision: Precision) {
        let cost = StepCost::of(engine.model(), precision);
        self.models.push(Model {
            name: model.name(),
            precision,
            policy: engine.policy().name(),
            compresses: engine.policy().decisions().is_some(),
            weight_bytes: cost.weight_bytes,
            cache: engine.pool().dtype().name(),
            page_bytes: engine.dense_usage(0).page_bytes,
        });
        self.costs.push(cost);
        self.engines.push(engine);
    }

    fn engines(&mut self) -> Vec<&mut Engine<FastCpu>> {
        self.engines.iter_mut().collect()
    }

    /// The shortest context.
    fn context(&self) -> usize {
        self.engines.iter().map(|engine| engine.model().shape.context).min().unwrap_or(0)
    }

    /// The vocabulary, which models that are given the same tokens share.
    fn vocabulary(&self, args: &ModelBenchArgs) -> Result<usize, AppError> {
        let sizes: Vec<usize> = self.engines.iter().map(|engine| engine.model().shape.vocab).collect();
        match (sizes[..].iter().min(), sizes[..].iter().max()) {
            (Some(&least), Some(&most)) if least == most => Ok(least),
            _ => Err(AppError::Text {
                file: args.against.clone().unwrap_or_default(),
                reason: "has another vocabulary than --model, so the two cannot be given the same tokens".into(),
            }),
        }
    }

    /// A row of prefill, or of decoding `after` tokens per sequence.
    fn row(&self, machine: &Machine, batch: Batch, after: Option<usize>, measured: Vec<Throughput>) -> Row {
        let Batch { sequences, tokens } = batch;
        let cell = |((throughput, cost), model): ((Throughput, &StepCost), &Model)| {
            let Throughput { rates, caches } = throughput;
            let flops = match after {
                None => cost.prefill_flops(batch) / (sequences * tokens) as f64,
                Some(_) => cost.flops,
            };
            Cell {
                products_of_peak: rates.median * flops / machine.peak(cost.precision),
                cache_bytes: caches.bytes,
                logical_ratio: caches.logical_ratio,
                physical_ratio: caches.physical_ratio(),
                bytes: after.map(|_| Bytes::of((cost, &caches), sequences, rates.median, (machine, model.compresses))),
                tokens_per_second: rates,
            }
        };
        Row {
            sequences,
            from: if after.is_some() { tokens } else { 0 },
            to: tokens + after.unwrap_or(0),
            models: measured.into_iter().zip(&self.costs).zip(&self.models).map(cell).collect(),
        }
    }
}

impl Bytes {
    /// Of a row of decoding at so many tokens per second.
    fn of(
        (cost, caches): (&StepCost, &Caches),
        sequences: usize,
        rate: f64,
        (machine, compresses): (&Machine, bool),
    ) -> Self {
        let ceiling = cost.byte_ceiling(sequences, caches.bytes, machine.bandwidth);
        Self {
            per_step: cost.step_bytes(caches.bytes),
            ceiling,
            reached: rate / ceiling,
            speed_up_ceiling: compresses.then(|| cost.byte_speed_up(caches)),
        }
    }
}

/// Where the sequences' tokens come from.
struct Source<'a> {
    args: &'a ModelBenchArgs,
    text: Option<Vec<u32>>,
    vocab: usize,
}

impl Source<'_> {
    /// For each sequence of each batch its tokens and `after` more.
    fn windows(&self, batches: Vec<Batch>, after: usize) -> Result<Vec<Windows>, AppError> {
        batches.into_iter().map(|batch| Ok((batch, self.of_batch(batch.sequences, batch.tokens + after)?))).collect()
    }

    fn of_batch(&self, sequences: usize, length: usize) -> Result<Vec<Vec<u32>>, AppError> {
        let Some(text) = &self.text else {
            let token = |sequence: usize, at: usize| hash(&[self.args.seed, sequence as u64, at as u64]);
            let window = |sequence| (0..length).map(|at| (token(sequence, at) % self.vocab as u64) as u32).collect();
            return Ok((0..sequences).map(window).collect());
        };
        let Some(spare) = text.len().checked_sub(length) else {
            return Err(AppError::Text {
                file: self.args.text.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
                reason: format!("has {} tokens and a sequence takes {length}; give more text", text.len()),
            });
        };
        let start = |sequence: usize| sequence * spare / (sequences - 1).max(1);
        Ok((0..sequences).map(|sequence| text[start(sequence)..][..length].to_vec()).collect())
    }
}

fn slices(windows: &[Vec<u32>]) -> Vec<&[u32]> {
    windows.iter().map(Vec::as_slice).collect()
}

fn table(result: &Output) -> String {
    let (giga, mega) = (|x: f64| x / 1e9, |x: f64| x / 1e6);
    let machine = &result.machine;
    let mut lines = vec![format!(
        "{}, {} on {} threads: {:.1} GB/s read, {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16",
        result.host.cpu,
        machine.level,
        machine.threads,
        giga(machine.bandwidth),
        giga(machine.peak_f32),
        giga(machine.peak_bf16)
    )];
    let letter = |n: usize| if n == 0 { 'A' } else { 'B' };
    for (n, model) in result.models.iter().enumerate() {
        lines.push(format!(
            "{}  {}: {} cache, {} weights, {:.1} MB of them read per step",
            letter(n),
            model.name,
            model.policy,
            format!("{:?}", model.precision).to_lowercase(),
            mega(model.weight_bytes as f64)
        ));
    }
    let head =
        |what: &str| format!("\n{what:<18} {:>10} {:>9} {:>9} {:>8}", "tokens/s", "slowest", "fastest", "of peak");
    let start = |row: &Row, n: usize, cell: &Cell, depth: String| {
        let Rates { median, min, max, .. } = cell.tokens_per_second;
        let batch = if n == 0 { format!("{} x {depth}", row.sequences) } else { String::new() };
        let peak = 100.0 * cell.products_of_peak;
        format!("{batch:<16} {} {median:>10.1} {min:>9.1} {max:>9.1} {peak:>7.0}%", letter(n))
    };
    let ratios = |cell: &Cell| format!("{:>8.2}x {:>8.2}x", cell.logical_ratio, cell.physical_ratio);
    if !result.prefill.is_empty() {
        lines.push(format!("{} {:>9} {:>9}", head("prefill"), "logical", "physical"));
    }
    for row in &result.prefill {
        let line = |(n, cell): (usize, &Cell)| format!("{} {}", start(row, n, cell, row.to.to_string()), ratios(cell));
        lines.extend(row.models.iter().enumerate().map(line));
    }
    if !result.decode.is_empty() {
        lines.push(format!(
            "{} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9}",
            head("decode at depth"),
            "logical",
            "physical",
            "MB/step",
            "ceiling",
            "reached",
            "speed-up"
        ));
    }
    for row in &result.decode {
        for (n, cell) in row.models.iter().enumerate() {
            let mut line = format!("{} {}", start(row, n, cell, format!("{}-{}", row.from, row.to)), ratios(cell));
            if let Some(bytes) = &cell.bytes {
                let Bytes { per_step, ceiling, reached, speed_up_ceiling } = bytes;
                let speed_up = speed_up_ceiling.map_or("-".into(), |most| format!("<={most:.2}x"));
                line += &format!(" {:>9.1} {ceiling:>9.1} {:>7.0}% {speed_up:>9}", mega(*per_step), 100.0 * reached);
            }
            lines.push(line);
        }
    }
    lines.join("\n")
}
