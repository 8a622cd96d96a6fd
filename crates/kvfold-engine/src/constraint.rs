//! Texts that must have a form: a grammar says which tokens may come next.

use std::fmt::Debug;

/// What a text may still become. A request's own; it sees the request's new tokens in order.
pub trait Constraint: Debug + Send {
    /// Takes away what may not come next, by logits of minus infinity. At least one token is left. An error ends the request.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes the token that was chosen. Whether the text is complete, and nothing may follow.
    fn take(&mut self, token: u32) -> Result<bool, String>;

    /// The same, for another request.
    fn copy(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.copy()
    }
}
