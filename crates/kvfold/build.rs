//! Asks git which commit is being built, for `--version` and for receipts.
//!
//! `KVFOLD_COMMIT` is the short hash, with `-dirty` when tracked files differ from it, or `unknown` where there is no git,
//! no repository, or a repository that is somebody else's (sources unpacked inside of it).

use std::path::Path;
use std::process::Command;

fn main() {
    let commit = commit().unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=KVFOLD_COMMIT={commit}");

    println!("cargo::rerun-if-changed=build.rs");
    // Sources decide whether the tree is dirty; what git writes at a commit or a checkout decides the hash. Not its index:
    // asking for the state of the tree may touch that, and then every build would be followed by another.
    let of_git = ["HEAD", "logs/HEAD", "packed-refs"].iter().filter_map(|name| git(&["rev-parse", "--git-path", name]));
    let branch = git(&["symbolic-ref", "-q", "HEAD"]).and_then(|name| git(&["rev-parse", "--git-path", &name]));
    let sources = ["..", "../../Cargo.toml", "../../Cargo.lock", "../../data"].map(String::from);
    for path in of_git.chain(branch).chain(sources) {
        // Cargo takes a path that does not exist for one that has changed.
        if Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

fn commit() -> Option<String> {
    git(&["ls-files", "--error-unmatch", "Cargo.toml"])?;
    git(&["describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"])
}

/// What git prints when it succeeds, without the line feed.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).env("GIT_OPTIONAL_LOCKS", "0").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim_end().to_owned())
}
