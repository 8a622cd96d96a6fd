//! Dynamic Memory Sparsification: a token is evicted when it leaves the window, or keeps its slot.

use super::CachePolicy;
use kvfold_kernels::dmc::{Dmc, Method};
use kvfold_kernels::paged::Rule;

/// Tokens are evicted as the model decides.
#[derive(Clone, Debug)]
pub struct Evicting {
    dmc: Dmc,
}

impl Evicting {
    /// The policy of a model retrofitted with these settings.
    pub fn new(dmc: Dmc) -> Self {
        Self { dmc }
    }
}

impl CachePolicy for Evicting {
    fn name(&self) -> &'static str {
        Method::Dms.name()
    }

    fn rule(&self) -> Rule {
        Rule::Evict { sinks: self.dmc.sinks, delay: self.dmc.delay }
    }

    fn decisions(&self) -> Option<&Dmc> {
        Some(&self.dmc)
    }
}
