//! A retrofitted model beside its original, as reports want it.

use crate::error::AppError;
use crate::output;
use kvfold_engine::Engine;
use kvfold_eval::{Comparison, compare};
use kvfold_kernels::FastCpu;
use kvfold_report::Quantiles;
use kvfold_report::receipt::{KvBytes, Memory, Perplexity, Quality};

/// Original and compressed model.
pub(crate) type Pair<'a> = (&'a mut Engine<FastCpu>, &'a mut Engine<FastCpu>);

/// Memory and quality of the compressed model over windows of held-out text.
pub(crate) fn measure(pair: Pair<'_>, windows: &[&[u32]], quiet: bool) -> Result<(Memory, Quality), AppError> {
    let bar = output::bar("evaluating", windows.len(), "windows", quiet);
    let comparison = compare(pair, windows, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    // Windows of packed documents differ in length.
    let tokens: usize = windows.iter().map(|window| window.len()).sum();
    let context = (tokens as f64 / windows.len().max(1) as f64).round() as usize;
    Ok((memory(&comparison, context), quality(&comparison)))
}

fn memory(comparison: &Comparison, context: usize) -> Memory {
    let compressed = &comparison.compressed.measured;
    // Mean bytes of a sequence; the parts are rounded, and their sum is what is stated.
    let detail = KvBytes {
        pages: compressed.mean_bytes(|u| u.slot_pages * u.page_bytes).round() as u64,
        ring: compressed.mean_bytes(|u| u.ring_pages * u.ring_page_bytes).round() as u64,
        open_state: compressed.mean_bytes(|u| u.states * u.state_bytes).round() as u64,
    };
    let original = &comparison.original.measured;
    let dense = original.mean_bytes(|u| u.bytes()).round() as u64;
    // A slot of a merged head stands for one slot of every head that went into it.
    let (heads, all) = (compressed.heads(), original.heads());
    let merged =
        all.iter().map(Vec::len).sum::<usize>() as f64 / heads.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    Memory {
        context_tokens: context as u64,
        logical_ratio: compressed.logical_ratio() * merged,
        physical_ratio: dense as f64 / detail.total() as f64,
        kv_bytes: detail.total(),
        dense_kv_bytes: dense,
        kv_bytes_detail: detail,
        heads: heads.into_iter().map(|layer| layer.into_iter().map(|ratio| ratio * merged).collect()).collect(),
    }
}

fn quality(comparison: &Comparison) -> Quality {
    let nothing = Quantiles { mean: f64::NAN, p95: f64::NAN, p99: f64::NAN };
    Quality {
        evaluated_tokens: comparison.compressed.predicted as u64,
        perplexity: Perplexity { dense: comparison.original.value(), compressed: comparison.compressed.value() },
        kl: Quantiles::of(comparison.kl.iter().copied()).unwrap_or(nothing),
        top1_agreement: comparison.top1_agreement(),
    }
}
