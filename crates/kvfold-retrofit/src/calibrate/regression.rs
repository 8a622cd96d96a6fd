//! Poisson regression: the expected cost of a token as the exponential of a linear function of its input.
//!
//! A threshold on the expected cost is what keeps the sum of the costs of a given number of folds low. The expectation of
//! the logarithm (least squares) is not: it forgives the rare token that is dear to fold. The loss is
//! `mean(exp(s) - c s) + RIDGE/2 |u|^2` with `s = w . y + b`, minimised by L-BFGS over `u`, the weights of inputs that have
//! been made uncorrelated.

use argmin::core::{CostFunction, Error, Executor, Gradient, State};
use argmin::solver::linesearch::MoreThuenteLineSearch;
use argmin::solver::quasinewton::LBFGS;
use kvfold_kernels::Grad;
use kvfold_kernels::ops::Precision;
use nalgebra::{Cholesky, DMatrix, DVector, Dyn};
use std::cell::RefCell;

/// Added to the inputs' covariance before it is inverted, relative to its mean diagonal.
const DAMPING: f64 = 0.1;
/// Penalty on weights of uncorrelated inputs.
const RIDGE: f64 = 0.01;
/// Steps of the optimiser, and gradients it remembers.
const STEPS: u64 = 12;
const MEMORY: usize = 7;
/// Largest `s` in the loss: beyond, a cost would be thousands of times the mean.
const HIGHEST: f64 = 8.0;

/// A linear function of `[C]`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub(super) weights: Vec<f64>,
    pub(super) bias: f64,
}

impl Linear {
    /// Its values for rows of inputs.
    pub(super) fn of<O: Grad>(&self, ops: &O, inputs: &[f32]) -> Vec<f64> {
        let columns = self.weights.len();
        let weights: Vec<f32> = self.weights.iter().map(|&w| w as f32).collect();
        let inputs = ops.tensor(&[inputs.len() / columns, columns], inputs);
        let values = ops.linear(&inputs, &ops.master(&[1, columns], &weights, Precision::F32));
        ops.to_host(&values).into_iter().map(|x| f64::from(x) + self.bias).collect()
    }
}

/// Inputs `[N, C]` of a layer, prepared for the regressions of all its heads.
pub(super) struct Inputs<'a, O: Grad> {
    ops: &'a O,
    rows: usize,
    mean: DVector<f64>,
    /// Inputs minus their mean.
    centred: O::Tensor,
    /// Root of the damped covariance; none where inputs do not vary.
    root: Option<Cholesky<f64, Dyn>>,
}

impl<'a, O: Grad> Inputs<'a, O> {
    /// Takes `[N, C]` numbers.
    pub(super) fn new(ops: &'a O, mut inputs: Vec<f32>, columns: usize) -> Self {
        let rows = inputs.len() / columns;
        let mut mean = DVector::<f64>::zeros(columns);
        for row in inputs.chunks_exact(columns) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x) / rows as f64);
        }
        for row in inputs.chunks_exact_mut(columns) {
            row.iter_mut().zip(&mean).for_each(|(x, &mean)| *x -= mean as f32);
        }
        let centred = ops.tensor(&[rows, columns], &inputs);
        let like = ops.master(&[columns, columns], &vec![0.0; columns * columns], Precision::F32);
        let products = ops.to_host(&ops.linear_grad_w(&centred, &like, &centred));
        let mut covariance =
            DMatrix::from_iterator(columns, columns, products.iter().map(|&x| f64::from(x) / rows as f64));
        let damping = DAMPING * covariance.trace() / columns as f64;
        (0..columns).for_each(|c| covariance[(c, c)] += damping);
        let root = if damping > 0.0 { Cholesky::new(covariance) } else { None };
        Self { ops, rows, mean, centred, root }
    }

    /// The logarithm of the expected cost, fitted to `costs [N]`, all above 0.
    pub(super) fn fit(&self, costs: &[f64]) -> Linear {
        let mean = costs.iter().sum::<f64>() / self.rows as f64;
        let constant = Linear { weights: vec![0.0; self.mean.len()], bias: mean.ln() };
        let Some(root) = &self.root else { return constant };
        let costs = costs.iter().map(|cost| cost / mean).collect();
        let problem = Problem { inputs: self, root, costs, last: RefCell::default() };
        let solver = LBFGS::new(MoreThuenteLineSearch::new(), MEMORY);
        let start = vec![0.0; self.mean.len() + 1];
        let run = Executor::new(problem, solver).configure(|state| state.param(start).max_iters(STEPS)).run();
        // An optimiser that finds no way down from the start leaves the constant, the best that is known.
        let Some(best) = run.ok().and_then(|run| run.state.get_best_param().cloned()) else { return constant };
        let (bias, weights) = best.split_last().expect("a bias at the end");
        let weights = weights_of(root, weights);
        Linear { bias: bias + mean.ln() - weights.dot(&self.mean), weights: weights.as_slice().to_vec() }
    }

    /// What a function says of every row.
    pub(super) fn values(&self, linear: &Linear) -> Vec<f64> {
        let weights = DVector::from_column_slice(&linear.weights);
        let centre = linear.bias + weights.dot(&self.mean);
        self.times(&weights).into_iter().map(|x| f64::from(x) + centre).collect()
    }

    /// `w . y` of every row, of centred inputs.
    fn times(&self, weights: &DVector<f64>) -> Vec<f32> {
        let weights: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
        let w = self.ops.master(&[1, weights.len()], &weights, Precision::F32);
        self.ops.to_host(&self.ops.linear(&self.centred, &w))
    }

    /// The sum over rows of `d y`, of centred inputs.
    fn sum(&self, d: &[f64]) -> DVector<f64> {
        let d: Vec<f32> = d.iter().map(|&d| d as f32).collect();
        let like = self.ops.master(&[1, self.mean.len()], &vec![0.0; self.mean.len()], Precision::F32);
        let sums = self.ops.linear_grad_w(&self.centred, &like, &self.ops.tensor(&[self.rows, 1], &d));
        DVector::from_iterator(self.mean.len(), self.ops.to_host(&sums).into_iter().map(f64::from))
    }
}

/// Weights of inputs for weights of uncorrelated inputs.
fn weights_of(root: &Cholesky<f64, Dyn>, uncorrelated: &[f64]) -> DVector<f64> {
    let mut weights = DVector::from_column_slice(uncorrelated);
    root.l_dirty().tr_solve_lower_triangular_mut(&mut weights);
    weights
}

/// The regression of one KV head.
struct Problem<'a, O: Grad> {
    inputs: &'a Inputs<'a, O>,
    root: &'a Cholesky<f64, Dyn>,
    /// Relative to their mean.
    costs: Vec<f64>,
    /// The last parameters and their `s`, since loss and gradient are asked for at the same place.
    last: RefCell<(Vec<f64>, Vec<f64>)>,
}

impl<O: Grad> Problem<'_, O> {
    /// Calls `f` with every row's `s`.
    fn with_values<T>(&self, param: &[f64], f: impl FnOnce(&[f64]) -> T) -> T {
        let mut last = self.last.borrow_mut();
        if last.0 != param {
            let (bias, weights) = param.split_last().expect("a bias at the end");
            let values = self.inputs.times(&weights_of(self.root, weights));
            *last = (param.to_vec(), values.iter().map(|&s| (f64::from(s) + bias).min(HIGHEST)).collect());
        }
        f(&last.1)
    }
}

impl<O: Grad> CostFunction for Problem<'_, O> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, param: &Vec<f64>) -> Result<f64, Error> {
        let penalty: f64 = param[..param.len() - 1].iter().map(|u| u * u).sum();
        let loss: f64 =
            self.with_values(param, |values| values.iter().zip(&self.costs).map(|(s, c)| s.exp() - c * s).sum());
        Ok(loss / self.costs.len() as f64 + 0.5 * RIDGE * penalty)
    }
}

impl<O: Grad> Gradient for Problem<'_, O> {
    type Param = Vec<f64>;
    type Gradient = Vec<f64>;

    fn gradient(&self, param: &Vec<f64>) -> Result<Vec<f64>, Error> {
        let rows = self.costs.len() as f64;
        let d: Vec<f64> = self
            .with_values(param, |values| values.iter().zip(&self.costs).map(|(s, c)| (s.exp() - c) / rows).collect());
        let mut weights = self.inputs.sum(&d);
        self.root.l_dirty().solve_lower_triangular_mut(&mut weights);
        let mut gradient: Vec<f64> = weights.iter().zip(param).map(|(d, u)| d + RIDGE * u).collect();
        gradient.push(d.iter().sum());
        Ok(gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvfold_kernels::FastCpu;
    use kvfold_kernels::noise::{hash, unit};

    const ROWS: usize = 4000;

    /// Correlated inputs, one of which is large and constant.
    fn inputs() -> Vec<f32> {
        let number = |n: usize, c: u64| (2.0 * unit(hash(&[n as u64, c])) - 1.0) as f32;
        (0..ROWS).flat_map(|n| [number(n, 0), 5.0, number(n, 0) * 0.9 + number(n, 1), 3.0 * number(n, 2)]).collect()
    }

    #[test]
    fn an_exponential_of_the_inputs_is_found_under_multiplicative_noise() {
        let ops = FastCpu::new();
        let inputs = inputs();
        let truth = |row: &[f32]| (1.2 * row[0] - 0.7 * row[2] + 0.2 * row[3] - 4.0) as f64;
        // The mean of the noise is 1, that of its logarithm is not.
        let noisy =
            |n: usize, row: &[f32]| truth(row).exp() * if unit(hash(&[9, n as u64])) < 0.25 { 3.7 } else { 0.1 };
        let costs: Vec<f64> = inputs.chunks_exact(4).enumerate().map(|(n, row)| noisy(n, row)).collect();
        let linear = Inputs::new(&ops, inputs.clone(), 4).fit(&costs);
        let far = inputs.chunks_exact(4).map(|row| {
            let value: f64 = row.iter().zip(&linear.weights).map(|(&x, w)| f64::from(x) * w).sum();
            (value + linear.bias - truth(row)).abs()
        });
        let far = far.sum::<f64>() / ROWS as f64;
        assert!(far < 0.1, "{far} from the truth on average: {linear:?}");
    }

    #[test]
    fn inputs_that_say_nothing_leave_the_mean() {
        let ops = FastCpu::new();
        let costs: Vec<f64> = (0..100).map(|n| 1.0 + unit(hash(&[n]))).collect();
        let mean = costs.iter().sum::<f64>() / 100.0;
        let linear = Inputs::new(&ops, vec![2.0; 300], 3).fit(&costs);
        let value = 2.0 * linear.weights.iter().sum::<f64>() + linear.bias;
        assert!((value - mean.ln()).abs() < 1e-3, "{value}, the mean is {mean}");
    }
}
