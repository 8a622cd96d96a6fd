//! Gradients by variable.

use crate::tape::Var;
use kvfold_kernels::Grad;

/// Gradients of a tape's variables; sums where a variable was used more than once.
#[derive(Debug)]
pub struct Grads<T> {
    by_id: Vec<Option<T>>,
}

impl<T: Clone> Grads<T> {
    pub(crate) fn new(variables: usize) -> Self {
        Self { by_id: vec![None; variables] }
    }

    /// The gradient of a variable; `None` when the result does not depend on it.
    pub fn get(&self, var: &Var<T>) -> Option<&T> {
        var.id.and_then(|id| self.by_id[id].as_ref())
    }

    pub(crate) fn take(&mut self, id: Option<usize>) -> Option<T> {
        id.and_then(|id| self.by_id[id].take())
    }

    /// Adds what `grad` computes to a variable's gradient; constants cost nothing.
    pub(crate) fn give<O: Grad<Tensor = T>>(&mut self, ops: &O, id: Option<usize>, grad: impl FnOnce() -> T) {
        let Some(id) = id else { return };
        let grad = grad();
        let sum = match self.by_id[id].take() {
            Some(sum) => ops.add(&sum, &grad, 1.0),
            None => grad,
        };
        self.by_id[id] = Some(sum);
    }
}
