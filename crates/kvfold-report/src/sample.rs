//! A receipt for the tests of this crate. The numbers are made up but agree
//! with each other.

use crate::quantiles::Quantiles;
use crate::receipt::{
    Decision, KvBytes, Machine, Memory, Method, Perplexity, Quality, Receipt, Schema, Speed, Story, Training,
};

pub(crate) fn receipt() -> Receipt {
    let heads = vec![vec![4.0, 8.0], vec![16.0, 10.0], vec![1.0625, 12.0]];
    let held: f64 = heads.iter().flatten().map(|ratio| 1.0 / ratio).sum();
    let kv_bytes_detail = KvBytes { pages: 40_960, open_state: 3_072, ring: 1_024 };
    Receipt {
        schema: Schema::V1,
        kvfold_version: "0.1.0".to_owned(),
        commit: "abc1234".to_owned(),
        command: "kvfold demo --seed 7 --json receipt.json".to_owned(),
        date: "2026-11-23T14:40:00Z".to_owned(),
        machine: Machine {
            cpu: "Example CPU @ 2.10GHz".to_owned(),
            cores: 2,
            memory_bytes: 8 << 30,
            os: "linux x86_64".to_owned(),
        },
        model: "stories260k".to_owned(),
        seed: 7,
        method: Method::Dmc,
        delay: 16,
        sinks: 1,
        decision: Decision::Head,
        memory: Memory {
            context_tokens: 512,
            logical_ratio: 6.0 / held,
            physical_ratio: 163_840.0 / 45_056.0,
            kv_bytes: 45_056,
            dense_kv_bytes: 163_840,
            kv_bytes_detail,
            heads,
        },
        quality: Quality {
            evaluated_tokens: 16_352,
            perplexity: Perplexity { dense: 3.69, compressed: 3.84 },
            kl: Quantiles { mean: 0.0412, p95: 0.183, p99: 0.612 },
            top1_agreement: 0.926,
        },
        tokens_per_second: Speed { dense: 4_210.0, compressed: 4_630.0, batch: 1, ceiling: Some(1.1) },
        training: Some(Training {
            steps: 150,
            tokens: 1_228_800,
            seconds: 96.0,
            saving_seconds: 1.0,
            tokens_per_second: 12_800.0,
        }),
        story: Some(Story {
            prompt: "Once upon a time".to_owned(),
            dense: "Once upon a time, there was a little girl named Lily. She loved to play \
                    outside in the park. One day, she saw a big, red ball."
                .to_owned(),
            compressed: "Once upon a time, there was a little girl named Lily. She loved to play \
                         with her toys. One day, her mom gave her a new doll."
                .to_owned(),
        }),
    }
}
