//! Runs that go on from a retrofitted model towards a higher ratio.

use crate::common::{HEAD, corpus, dmc, settings, steps, tiny, trainer};
use kvfold_kernels::FastCpu;
use kvfold_model::Checkpoint;
use kvfold_retrofit::schedule::place;
use kvfold_retrofit::settings::Train;
use kvfold_retrofit::{Origin, RunDir, Settings, Trainer};
use std::collections::BTreeMap;

/// The tiny model taught 2x, in its attention alone.
fn taught() -> Checkpoint {
    let run = Settings { train: Train::Attention, ..settings(HEAD, (0, 2, 2)) };
    let mut trainer = trainer(&run);
    steps(&mut trainer, &corpus(3), 4);
    trainer.checkpoint(&tiny()).unwrap()
}

/// The run that goes on from a model to 4x.
fn onward(model: &Checkpoint) -> Settings {
    let (origin, method) = Origin::of(model).unwrap();
    let run = Settings { method, ratio: 4.0, train: Train::Attention, ..settings(HEAD, (0, 3, 2)) };
    run.beginning_at(origin)
}

fn going_on(model: &Checkpoint, run: &Settings) -> Trainer<FastCpu> {
    Trainer::from_model(FastCpu::new(), &tiny(), model, run.clone()).unwrap()
}

#[test]
fn a_run_begins_with_the_weights_and_the_ratio_of_its_origin() {
    let model = taught();
    let run = onward(&model);
    let trainer = going_on(&model, &run);
    let state: BTreeMap<_, _> = trainer.state().into_iter().filter(|(name, _)| !name.contains("v.model")).collect();
    let mut compared = 0;
    for (name, tensor) in &model.tensors {
        if let Some(trains) = state.get(name) {
            assert_eq!(trains.to_f32(), tensor.to_f32(), "{name}");
            compared += 1;
        }
    }
    let trained = model.tensors.keys().filter(|name| run.train.trains(name)).count();
    assert!(compared == trained && compared > 0, "{compared} of {trained}");
    let ratios: Vec<f64> = (0..5).map(|step| place(&run, step).ratio).collect();
    assert!(ratios.windows(2).all(|pair| pair[0] <= pair[1]) && ratios[0] > 2.0 && ratios[2] == 4.0, "{ratios:?}");
}

#[test]
fn the_teacher_is_the_original() {
    let model = taught();
    // With nothing to fold and nothing learned yet, what is left of the loss is what the origin's training changed.
    let mut run = onward(&model);
    run.learning.rate = 0.0;
    let of_origin = going_on(&model, &run).step(&corpus(3)).unwrap().task_loss;
    let plain = Settings { from: None, ..run.clone() };
    let of_plain = trainer(&plain).step(&corpus(3)).unwrap().task_loss;
    assert!(of_origin > 0.0 && of_origin != of_plain, "{of_origin} {of_plain}");
    let mut learns = going_on(&model, &onward(&model));
    let reports = steps(&mut learns, &corpus(3), 5);
    assert!(reports.iter().all(|report| report.task_loss.is_finite()));
    let saved = learns.checkpoint(&tiny()).unwrap().config.compression.unwrap();
    assert_eq!((saved.ratio, saved.base_model), (4.0, "tiny".into()));
}

#[test]
fn a_resumed_run_that_goes_on_ends_with_the_same_bits() {
    let (model, base, corpus) = (taught(), tiny(), corpus(4));
    let run = onward(&model);
    let mut whole = going_on(&model, &run);
    steps(&mut whole, &corpus, 5);
    let dir = tempfile::tempdir().unwrap();
    let place = RunDir::of(&dir.path().join("out"));
    let mut first = going_on(&model, &run);
    place.create(&base, &run, &corpus).unwrap();
    let reports = steps(&mut first, &corpus, 2);
    place.save(&first, &reports).unwrap();
    drop((first, place));
    let mut second = going_on(&model, &run);
    RunDir::of(&dir.path().join("out")).resume(&base, &mut second).unwrap();
    assert_eq!(second.steps(), 2);
    steps(&mut second, &corpus, 5);
    assert_eq!(crate::common::bits(&whole), crate::common::bits(&second));
}

#[test]
fn what_is_no_origin_is_refused() {
    let model = taught();
    let refused = |error: kvfold_retrofit::RetrofitError, says: &str| {
        let message = error.to_string();
        assert!(message.starts_with("`from` is tiny, ") && message.contains(says), "{message}");
    };
    refused(Origin::of(&tiny()).unwrap_err(), "a plain model");
    let from = |model: &Checkpoint, run: &Settings| {
        Trainer::from_model(FastCpu::new(), &tiny(), model, run.clone()).unwrap_err()
    };
    let mut other = onward(&model);
    dmc(&mut other).delay = 5;
    refused(from(&model, &other), "compressed in another way");
    let mut changed = model.clone();
    let name = changed.tensors.keys().find(|name| name.contains("decide")).unwrap().clone();
    changed.tensors.insert(
        name.clone(),
        kvfold_tensor::HostTensor::from_f32(
            changed.tensors[&name].shape().to_vec(),
            &vec![0.5; changed.tensors[&name].to_f32().len()],
        ),
    );
    refused(from(&changed, &onward(&model)), "not the model that the run began at");
    let lower = Settings { ratio: 1.5, ..onward(&model) };
    let message = from(&model, &lower).to_string();
    assert!(message.starts_with("`ratio` is 1.5; expected at least that of the model"), "{message}");
    let message = Trainer::new(FastCpu::new(), &tiny(), onward(&model)).unwrap_err().to_string();
    assert!(message.starts_with("`from` is missing"), "{message}");
}
