//! `kvfold demo`: only what costs nothing. The whole of it runs in CI, where its receipt is held to the promises.

use crate::common::Dir;

#[test]
fn what_is_in_the_way_is_found_before_the_work() {
    let dir = Dir::new();
    dir.write("model", "");
    dir.run(&["demo", "--out", "model"]).fails(3, &["model", "already exists"]);
    dir.run(&["demo", "--out", "none/model"]).fails(3, &["none/model", "create that first"]);
    dir.run(&["demo", "--out", "stories260k"]).fails(3, &["name of an embedded model"]);
    dir.run(&["demo", "--json", "none/receipt.json"]).fails(3, &["none/receipt.json", "create that first"]);
    dir.run(&["demo", "--json", "."]).fails(3, &["is a directory"]);
    assert_eq!(dir.list("."), ["model"]);
}
