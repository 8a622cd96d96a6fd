//! The tape: what was computed, and how to go back.

use crate::grads::Grads;
use kvfold_kernels::Grad;
use std::cell::{Cell, RefCell};
use std::fmt;

/// A tensor on a tape. Constants have no id and are never differentiated.
#[derive(Clone, Debug)]
pub struct Var<T> {
    /// What was computed.
    pub value: T,
    pub(crate) id: Option<usize>,
}

impl<T> Var<T> {
    /// A tensor that gets no gradient.
    pub fn constant(value: T) -> Self {
        Self { value, id: None }
    }
}

/// Takes the gradients of its op's outputs and gives those of its inputs.
type Record<O> = Box<dyn FnOnce(&O, &mut Grads<<O as kvfold_kernels::Ops>::Tensor>)>;

/// Records ops for one backward pass.
pub struct Tape<O: Grad> {
    pub(crate) ops: O,
    records: RefCell<Vec<Record<O>>>,
    variables: Cell<usize>,
}

impl<O: Grad> fmt::Debug for Tape<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tape({} variables, {} records)", self.variables.get(), self.records.borrow().len())
    }
}

impl<O: Grad + Clone + 'static> Tape<O>
where
    O::Tensor: 'static,
{
    /// An empty tape over a backend.
    pub fn new(ops: O) -> Self {
        Self { ops, records: RefCell::default(), variables: Cell::new(0) }
    }

    /// The backend below.
    pub fn backend(&self) -> &O {
        &self.ops
    }

    /// A variable to differentiate by.
    pub fn param(&self, value: O::Tensor) -> Var<O::Tensor> {
        Var { value, id: Some(self.new_id()) }
    }

    fn new_id(&self) -> usize {
        let id = self.variables.get();
        self.variables.set(id + 1);
        id
    }

    /// Outputs of an op: variables when some input is one.
    pub(crate) fn outputs<const N: usize>(
        &self,
        inputs: &[&Var<O::Tensor>],
        values: [O::Tensor; N],
    ) -> [Var<O::Tensor>; N] {
        let tracked = inputs.iter().any(|input| input.id.is_some());
        values.map(|value| Var { value, id: tracked.then(|| self.new_id()) })
    }

    pub(crate) fn record(&self, record: impl FnOnce(&O, &mut Grads<O::Tensor>) + 'static) {
        self.records.borrow_mut().push(Box::new(record));
    }

    /// Records an op with one output; `back` gets the output's gradient, and is called only if there is one.
    pub(crate) fn one(
        &self,
        inputs: &[&Var<O::Tensor>],
        value: O::Tensor,
        back: impl FnOnce(&O, &O::Tensor, &mut Grads<O::Tensor>) + 'static,
    ) -> Var<O::Tensor> {
        let [out] = self.outputs(inputs, [value]);
        if let Some(id) = out.id {
            self.record(move |ops, grads| {
                if let Some(d) = grads.take(Some(id)) {
                    back(ops, &d, grads);
                }
            });
        }
        out
    }

    /// Runs `f` keeping nothing but its inputs, and again, recorded, when its gradient is due.
    ///
    /// `f` must compute the same from the same inputs, and everything that is to get a gradient must be an input. What
    /// is wanted from inside must be an output: a side effect of `f` happens twice.
    pub fn segment(
        &self,
        inputs: Vec<Var<O::Tensor>>,
        f: impl Fn(&Self, &[Var<O::Tensor>]) -> Vec<Var<O::Tensor>> + 'static,
    ) -> Vec<Var<O::Tensor>> {
        let constants: Vec<_> = inputs.iter().map(|input| Var::constant(input.value.clone())).collect();
        let values = f(&Self::new(self.ops.clone()), &constants);
        if inputs.iter().all(|input| input.id.is_none()) {
            return values;
        }
        let outs: Vec<_> = values.into_iter().map(|out| self.param(out.value)).collect();
        let ids: Vec<_> = outs.iter().map(|out| out.id).collect();
        self.record(move |ops, grads| {
            let seeds: Vec<_> = ids.iter().map(|&id| grads.take(id)).collect();
            if seeds.iter().all(Option::is_none) {
                return;
            }
            let again = Self::new(ops.clone());
            let leaves: Vec<_> = inputs
                .iter()
                .map(|input| match input.id {
                    Some(_) => again.param(input.value.clone()),
                    None => input.clone(),
                })
                .collect();
            let outs = f(&again, &leaves);
            let seeds = outs.iter().zip(seeds).filter_map(|(out, seed)| Some((out, seed?))).collect::<Vec<_>>();
            let mut inner = again.backward_seeded(&seeds);
            for (input, leaf) in inputs.iter().zip(&leaves) {
                if let Some(grad) = inner.take(leaf.id) {
                    grads.give(ops, input.id, || grad);
                }
            }
        });
        outs
    }

    /// Gradients of a scalar `[1]` by every parameter of this tape.
    pub fn backward(self, loss: &Var<O::Tensor>) -> Grads<O::Tensor> {
        let one = self.ops.tensor(&[1], &[1.0]);
        self.backward_seeded(&[(loss, one)])
    }

    /// Gradients by every parameter of the sum of `seed * output` over some outputs.
    pub fn backward_seeded(self, seeds: &[(&Var<O::Tensor>, O::Tensor)]) -> Grads<O::Tensor> {
        let mut grads = Grads::new(self.variables.get());
        for (out, seed) in seeds {
            grads.give(&self.ops, out.id, || seed.clone());
        }
        for record in self.records.into_inner().into_iter().rev() {
            record(&self.ops, &mut grads);
        }
        grads
    }
}
