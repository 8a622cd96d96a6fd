//! Gradients by variable.

use crate::tape::Var;
use kvfold_kernels::Grad;

/// Gradients of a tape's parameters; sums where one was used more than once.
#[derive(Debug)]
pub struct Grads<T> {
    by_id: Vec<Option<T>>,
}

impl<T: Clone> Grads<T> {
    pub(crate) fn new(variables: usize) -> Self {
        Self { by_id: vec![None; variables] }
    }

    /// The gradient of a parameter; `None` when the result does not depend on it. Gradients of what an op computed are
    /// gone by the end of the backward pass.
    pub fn get(&self, var: &Var<T>) -> Option<&T> {
        var.id.and_then(|id| self.by_id[id].as_ref())
    }

    pub(crate) fn take(&mut self, id: Option<usize>) -> Option<T> {
        id.and_then(|id| self.by_id[id].take())
    }

    /// The gradients of an op's outputs, zeros for those that the result does not depend on; `None` when it depends on
    /// none of them.
    pub(crate) fn take_or_zeros<O: Grad<Tensor = T>, const N: usize>(
        &mut self,
        ops: &O,
        outs: [Var<T>; N],
    ) -> Option<[T; N]> {
        let taken = outs.map(|out| (self.take(out.id), out.value));
        let any = taken.iter().any(|(grad, _)| grad.is_some());
        any.then(|| taken.map(|(grad, value)| grad.unwrap_or_else(|| ops.zeros_like(&value))))
    }

    /// Adds what `grad` computes to a variable's gradient; constants cost nothing.
    pub(crate) fn give<O: Grad<Tensor = T>>(&mut self, ops: &O, id: Option<usize>, grad: impl FnOnce() -> T) {
        self.give_onto(id, |sum| {
            let grad = grad();
            match sum {
                Some(sum) => ops.add(&sum, &grad, 1.0),
                None => grad,
            }
        });
    }

    /// The same where `sum` adds to the gradient by itself.
    pub(crate) fn give_onto(&mut self, id: Option<usize>, sum: impl FnOnce(Option<T>) -> T) {
        let Some(id) = id else { return };
        self.by_id[id] = Some(sum(self.by_id[id].take()));
    }
}
