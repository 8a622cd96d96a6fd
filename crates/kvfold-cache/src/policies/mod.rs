//! What becomes of a token's pair. To add a policy: a file here, and, if it does something no [`Rule`] does yet, a rule in
//! the kernel.

mod dense;
mod evicting;
mod folding;

pub use dense::Dense;
pub use evicting::Evicting;
pub use folding::Folding;

use kvfold_kernels::dmc::{Dmc, Method};
use kvfold_kernels::paged::Rule;
use std::fmt::Debug;

/// The only difference between ways to hold a cache.
pub trait CachePolicy: Debug + Send + Sync {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// What the kernel does with a token.
    fn rule(&self) -> Rule;

    /// The model's decisions that the rule follows; `None` when it follows none.
    fn decisions(&self) -> Option<&Dmc>;
}

/// The policy of a model: that of its method, or the full cache.
pub fn policy_of(dmc: Option<&Dmc>) -> Box<dyn CachePolicy> {
    match dmc {
        None => Box::new(Dense),
        Some(dmc) => match dmc.method {
            Method::Dmc => Box::new(Folding::new(dmc.clone())),
            Method::Dms => Box::new(Evicting::new(dmc.clone())),
        },
    }
}
