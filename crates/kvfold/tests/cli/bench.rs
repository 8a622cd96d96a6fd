//! `kvfold bench kernels`.

use crate::common::{Dir, assert_keys, number};

#[test]
fn every_kernel_has_a_time_beside_the_machines_best() {
    let args = ["bench", "kernels", "--tokens", "40", "--rounds", "1"];
    let dir = Dir::new();
    let json = dir.run_with(&args, &["--json"]).json();
    assert_keys(
        &json,
        &["schema", "kvfold_version", "commit", "model", "tokens", "rounds", "machine", "kernels", "command"],
    );
    for best in ["/machine/peak_f32", "/machine/peak_bf16", "/machine/bandwidth"] {
        assert!(number(&json, best) > 1e8, "{best}");
    }
    let kernels = json["kernels"].as_array().expect("a list");
    for kernel in kernels {
        assert!(number(kernel, "/seconds") > 0.0 && number(kernel, "/bytes") > 0.0, "{kernel}");
        assert_eq!(number(kernel, "/flops") > 0.0, kernel["of_peak"].is_f64(), "{kernel}");
    }
    for name in ["linear bf16", "linear backward w bf16", "folding attention backward", "pool", "rope"] {
        assert!(kernels.iter().any(|kernel| kernel["kernel"] == name), "no {name}");
    }
    let table = dir.run(&args).ok();
    assert!(table.contains("GFLOP/s bf16") && table.lines().count() == kernels.len() + 3, "{table}");
}

#[test]
fn a_batch_of_nothing_is_refused() {
    let ran = Dir::new().run(&["bench", "kernels", "--tokens", "0"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("--tokens"), "{}", ran.err);
}
