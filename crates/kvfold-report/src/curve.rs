//! The training curve: how a retrofit went, step by step.
//!
//! As JSON it stands beside the model it led to, with the settings of the run,
//! so that two runs can be compared long after. One point takes one line: a
//! curve can be followed with `tail`, and two of them with `diff`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::format;
use crate::non_finite::nullable;

/// A training curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// The format of the document.
    pub schema: Schema,
    /// The settings of the run, in whatever shape the trainer keeps them.
    pub settings: Value,
    /// The points, in the order of the steps.
    pub points: Vec<Point>,
}

/// The format of a curve. A new variant is a new format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schema {
    /// The first format.
    #[default]
    #[serde(rename = "kvfold.curve/1")]
    V1,
}

/// One step of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The step, counted from 1.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// The stage of the schedule, by name.
    pub stage: String,
    /// What was minimised: the task loss and the weighted hinge.
    #[serde(deserialize_with = "nullable")]
    pub loss: f64,
    /// Cross-entropy or distance to the original model, in nats per token.
    #[serde(deserialize_with = "nullable")]
    pub task_loss: f64,
    /// How far compression lags behind its target.
    #[serde(deserialize_with = "nullable")]
    pub hinge: f64,
    /// The logical ratio asked for at this step.
    #[serde(deserialize_with = "nullable")]
    pub ratio_target: f64,
    /// The logical ratio of the decisions taken at this step.
    #[serde(deserialize_with = "nullable")]
    pub ratio: f64,
    /// The norm of all gradients, before clipping.
    #[serde(deserialize_with = "nullable")]
    pub grad_norm: f64,
    /// The learning rate.
    #[serde(deserialize_with = "nullable")]
    pub lr: f64,
    /// The speed of this step.
    #[serde(deserialize_with = "nullable")]
    pub tokens_per_second: f64,
}

impl Curve {
    /// An empty curve of a run with these settings.
    pub fn new(settings: Value) -> Curve {
        Curve { schema: Schema::V1, settings, points: Vec::new() }
    }

    /// The document as JSON, one point a line, with a final line feed.
    pub fn to_json(&self) -> String {
        let part = |value: Result<String, serde_json::Error>| {
            value.expect("a curve has string keys only, so it is always valid JSON")
        };
        let schema = part(serde_json::to_string(&self.schema));
        let settings = part(serde_json::to_string_pretty(&self.settings)).replace('\n', "\n  ");
        let points: Vec<String> =
            self.points.iter().map(|point| format!("\n    {}", part(serde_json::to_string(point)))).collect();
        let end = if points.is_empty() { "" } else { "\n  " };
        format!(
            "{{\n  \"schema\": {schema},\n  \"settings\": {settings},\n  \"points\": [{}{end}]\n}}\n",
            points.join(",")
        )
    }

    /// Reads a curve. A document of another format is an error.
    pub fn from_json(json: &str) -> Result<Curve, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// Loss and ratio from the first step to the last, each as a sparkline of
    /// `width` characters, on one line. Empty without points.
    pub fn line(&self, width: usize) -> String {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return String::new();
        };
        let draw = |value: fn(&Point) -> f64| sparkline(&self.points.iter().map(value).collect::<Vec<_>>(), width);
        format!(
            "task loss {} {} {}   ratio {} {} {}",
            format::nats(first.task_loss),
            draw(|point| point.task_loss),
            format::nats(last.task_loss),
            format::ratio(first.ratio),
            draw(|point| point.ratio),
            format::ratio(last.ratio)
        )
    }
}

/// Values as a row of bars at most `width` characters long, from the lowest
/// value to the highest; neighbours that share a character are averaged. A
/// space stands where there is no finite value.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = width.min(values.len());
    let means: Vec<f64> = (0..columns)
        .map(|i| {
            let shared = &values[i * values.len() / columns..(i + 1) * values.len() / columns];
            let finite: Vec<f64> = shared.iter().copied().filter(|v| v.is_finite()).collect();
            finite.iter().sum::<f64>() / finite.len() as f64
        })
        .collect();
    let finite = || means.iter().copied().filter(|mean| mean.is_finite());
    let low = finite().fold(f64::INFINITY, f64::min);
    let span = finite().fold(f64::NEG_INFINITY, f64::max) - low;
    means
        .iter()
        .map(|&mean| {
            if !mean.is_finite() {
                ' '
            } else if span > 0.0 {
                BARS[((mean - low) / span * 7.0).round() as usize]
            } else {
                BARS[0]
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn made_up(steps: u64) -> Curve {
        let mut curve = Curve::new(json!({ "ratio": 4.0, "seed": 7 }));
        for step in 1..=steps {
            let done = step as f64 / steps as f64;
            let task_loss = 0.5 / step as f64;
            curve.points.push(Point {
                step,
                tokens: step * 8192,
                stage: "ramp".to_owned(),
                loss: task_loss + 0.01,
                task_loss,
                hinge: 0.01,
                ratio_target: 1.0 + 3.0 * done,
                ratio: 1.0 + 3.125 * done,
                grad_norm: 0.5,
                lr: 0.002,
                tokens_per_second: 12_345.5,
            });
        }
        curve
    }

    #[test]
    fn one_point_a_line() {
        insta::assert_snapshot!(made_up(2).to_json(), @r#"
        {
          "schema": "kvfold.curve/1",
          "settings": {
            "ratio": 4.0,
            "seed": 7
          },
          "points": [
            {"step":1,"tokens":8192,"stage":"ramp","loss":0.51,"task_loss":0.5,"hinge":0.01,"ratio_target":2.5,"ratio":2.5625,"grad_norm":0.5,"lr":0.002,"tokens_per_second":12345.5},
            {"step":2,"tokens":16384,"stage":"ramp","loss":0.26,"task_loss":0.25,"hinge":0.01,"ratio_target":4.0,"ratio":4.125,"grad_norm":0.5,"lr":0.002,"tokens_per_second":12345.5}
          ]
        }
        "#);
    }

    #[test]
    fn round_trips_also_when_empty() {
        for steps in [0, 1, 50] {
            let curve = made_up(steps);
            assert_eq!(Curve::from_json(&curve.to_json()).expect("own JSON"), curve);
        }
    }

    #[test]
    fn a_loss_that_diverged_reads_back_as_nan() {
        let mut curve = made_up(1);
        curve.points[0].loss = f64::INFINITY;
        let back = Curve::from_json(&curve.to_json()).expect("own JSON");
        assert!(back.points[0].loss.is_nan());
    }

    #[test]
    fn another_format_is_refused_by_name() {
        let json = made_up(1).to_json().replace("kvfold.curve/1", "kvfold.curve/9");
        let error = Curve::from_json(&json).expect_err("unknown format").to_string();
        assert!(error.contains("kvfold.curve/9") && error.contains("kvfold.curve/1"), "{error}");
    }

    #[test]
    fn the_line_shows_where_it_began_and_ended() {
        insta::assert_snapshot!(made_up(40).line(16), @"task loss 0.500 █▃▂▂▂▁▁▁▁▁▁▁▁▁▁▁ 0.0125   ratio 1.08x ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██ 4.12x");
        assert_eq!(made_up(0).line(16), "");
    }

    #[test]
    fn sparklines_of_odd_inputs() {
        assert_eq!(sparkline(&[], 8), "");
        assert_eq!(sparkline(&[1.0], 8), "▁");
        assert_eq!(sparkline(&[2.0, 2.0], 8), "▁▁");
        assert_eq!(sparkline(&[0.0, f64::NAN, 7.0], 8), "▁ █");
        assert_eq!(sparkline(&[0.0, 0.0, 7.0, 7.0], 2), "▁█");
        assert_eq!(sparkline(&[1.0, 2.0], 0), "");
    }
}
