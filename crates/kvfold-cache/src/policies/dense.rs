//! The full cache: every token keeps its slot.

use super::CachePolicy;
use kvfold_kernels::dmc::Dmc;
use kvfold_kernels::paged::Rule;

/// Every token keeps a slot of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dense;

impl CachePolicy for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn rule(&self) -> Rule {
        Rule::Keep
    }

    fn decisions(&self) -> Option<&Dmc> {
        None
    }
}
