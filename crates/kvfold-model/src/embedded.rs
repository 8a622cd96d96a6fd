//! Models that are part of the binary.
//!
//! `stories260k` is a Llama of 260 thousand parameters that tells children's stories. With it, the first command a user
//! types works without a download, and tests run on real weights instead of noise. Its origin and licence are beside its
//! files in `models/stories260k`.

/// The files of a model: name and content.
pub(crate) type Files = &'static [(&'static str, &'static [u8])];

/// The name of the embedded teller of children's stories.
pub const STORIES260K: &str = "stories260k";

/// The names of the models that [`Checkpoint::open`](crate::Checkpoint::open) knows without a directory.
pub const NAMES: &[&str] = &[STORIES260K];

static STORIES260K_FILES: Files = &[
    ("config.json", include_bytes!("../models/stories260k/config.json")),
    ("model.safetensors", include_bytes!("../models/stories260k/model.safetensors")),
    ("tokenizer.json", include_bytes!("../models/stories260k/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../models/stories260k/tokenizer_config.json")),
    ("LICENSE", include_bytes!("../models/stories260k/LICENSE")),
];

/// The files of the embedded model of this name.
pub(crate) fn find(name: &str) -> Option<Files> {
    (name == STORIES260K).then_some(STORIES260K_FILES)
}
