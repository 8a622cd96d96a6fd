//! What a retrofit is trained on and measured on: the user's texts, or the model's own.

use super::train::{SelfText, self_text};
use crate::cli::RetrofitArgs;
use crate::error::AppError;
use crate::output;
use kvfold_engine::Engine;
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use kvfold_report::format;
use kvfold_retrofit::corpus::Amount;
use kvfold_retrofit::documents::{self, Document};
use kvfold_retrofit::settings::Text;
use kvfold_retrofit::{Corpus, Settings, corpus};

/// Sequences that are kept from training to measure on: a tenth of the text, at least one and at most this many.
const HELD_OUT: usize = 16;
/// Sequences of the rest that decisions settle on: another tenth, and at most this many.
const SETTLING: usize = 8;

/// The user's documents; none when the model writes its own.
pub(crate) struct Texts(Vec<Document>);

impl Texts {
    /// Reads what --text names, in the order of the seed.
    pub(crate) fn read(args: &RetrofitArgs) -> Result<Self, AppError> {
        let mut documents = documents::read(&args.text, &args.text_field)?;
        documents::shuffle(&mut documents, args.seed);
        Ok(Self(documents))
    }

    /// What the settings say of them.
    pub(crate) fn settings(&self, args: &RetrofitArgs, settings: &Settings) -> Text {
        if args.text.is_empty() {
            return Text::Own { samples: args.samples };
        }
        // What every step takes, once, or what decisions are fitted on, and what is kept to measure on.
        let &Settings { stages, length, batch, calibration, .. } = settings;
        let steps = stages.total().saturating_mul(batch as u64).saturating_mul(length as u64);
        let used = usize::try_from(steps).unwrap_or(usize::MAX).max(calibration.map_or(0, |fit| fit.tokens));
        let enough = used.saturating_add((used / 9).min(HELD_OUT.saturating_mul(length)).max(length));
        Text::Given {
            digest: documents::digest(&self.0),
            max_tokens: Some(args.max_tokens.unwrap_or(enough)),
            reset: !args.no_reset,
        }
    }

    /// The corpus that the settings define.
    pub(crate) fn corpus(&self, settings: &Settings, base: &Checkpoint, quiet: bool) -> Result<Corpus, AppError> {
        let length = settings.length;
        match settings.text {
            Text::Own { samples } => {
                let wanted = SelfText { texts: samples, length, seed: settings.seed };
                // Gone before training starts, which needs the memory.
                let mut original = Engine::new(FastCpu::new(), base);
                let texts = self_text(&mut original, base, wanted, quiet)?;
                Ok(Corpus::cut(texts.into_iter().flatten().collect(), length)?)
            }
            Text::Given { max_tokens, reset, .. } => {
                let bytes = self.0.iter().map(|document| document.text.len()).sum();
                let bar = output::bar("reading the text", bytes, "bytes", quiet);
                let tokens = max_tokens.unwrap_or(usize::MAX);
                // A sequence of each document; a stream is what the documents are, one after the other.
                let amount = Amount { tokens, of_each: if reset { length } else { usize::MAX } };
                let encoded = corpus::encode(&self.0, &base.tokenizer, amount, |done| bar.set_position(done as u64))?;
                bar.finish_and_clear();
                Ok(if reset { Corpus::pack(encoded, length)? } else { Corpus::stream(encoded, length)? })
            }
        }
    }
}

/// Checks that there is something to train on and something else to measure on, and that it can be folded.
pub(crate) fn check(corpus: &Corpus, settings: &Settings) -> Result<(), AppError> {
    if corpus.len() < 2 {
        return Err(AppError::Text {
            file: "the training text".into(),
            reason: format!(
                "it fills one sequence of {} tokens, and two are needed, one to train on and one to measure on; give \
                 more text or a smaller --length",
                corpus.length()
            ),
        });
    }
    let asked = settings.ratio_on((0..corpus.len()).flat_map(|n| corpus.lengths(n)))?;
    if asked < 0.95 * settings.ratio {
        output::note(&format!(
            "kvfold: the documents are short: {} at {} tokens is {} on them, since the {} newest of each stay exact",
            format::ratio(settings.ratio),
            settings.length,
            format::ratio(asked),
            settings.method.exempt().delay,
        ));
    }
    Ok(())
}

/// What a corpus is used for.
#[derive(Debug)]
pub(crate) struct Split<'a> {
    pub(crate) training: Corpus,
    /// On which decisions settle: a model folds more of a text that it was trained on. The training text where there is too
    /// little to keep any from training.
    pub(crate) settling: Corpus,
    /// Documents of the last sequences, each by itself, for the measurement.
    pub(crate) held_out: Vec<&'a [u32]>,
}

/// Keeps the last sequences for the measurement, and of the others some from here and there to settle on.
pub(crate) fn split(corpus: &Corpus) -> Split<'_> {
    let held = (corpus.len() / 10).clamp(1, HELD_OUT);
    let kept = corpus.len() - held;
    // One token predicts nothing.
    let held_out = (kept..corpus.len()).flat_map(|n| corpus.pieces(n)).filter(|piece| piece.len() > 1).collect();
    let settles = (kept / 10).min(SETTLING);
    let settling: Vec<usize> = (0..settles).map(|n| (2 * n + 1) * kept / (2 * settles)).collect();
    let training = corpus.select(&(0..kept).filter(|n| !settling.contains(n)).collect::<Vec<_>>());
    let settling = if settling.is_empty() { training.clone() } else { corpus.select(&settling) };
    Split { training, settling, held_out }
}
