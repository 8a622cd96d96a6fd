//! Dynamic Memory Compression: a token is appended or folded into the newest slot, at once or after a delay.

use super::CachePolicy;
use kvfold_kernels::dmc::{Dmc, Method};
use kvfold_kernels::paged::Rule;

/// Tokens are folded as the model decides.
#[derive(Clone, Debug)]
pub struct Folding {
    dmc: Dmc,
}

impl Folding {
    /// The policy of a model retrofitted with these settings.
    pub fn new(dmc: Dmc) -> Self {
        Self { dmc }
    }
}

impl CachePolicy for Folding {
    fn name(&self) -> &'static str {
        Method::Dmc.name()
    }

    fn rule(&self) -> Rule {
        let Dmc { sinks, delay, pool_window, log_mass, .. } = self.dmc;
        Rule::Fold { sinks, delay, pool_window, log_mass }
    }

    fn decisions(&self) -> Option<&Dmc> {
        Some(&self.dmc)
    }
}
