//! The arguments of `kvfold serve`.

use super::{CacheArg, ModelArgs, PrecisionArg};
use clap::Args;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where `runs/fetch-*.sh` put models.
const FETCHED: &str = "models";

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Model directory, delta, the name of a model under models/, or stories260k
    #[arg(value_name = "MODEL")]
    model: String,

    /// A delta over MODEL
    #[arg(long, value_name = "FILE")]
    delta: Option<PathBuf>,

    /// How weights are held and multiplied [default: bf16 if they are stored in 16 bits]
    #[arg(long, value_enum)]
    precision: Option<PrecisionArg>,

    /// How the cache holds keys and values [default: as the weights are held]
    #[arg(long, value_enum, value_name = "TYPE")]
    cache: Option<CacheArg>,

    /// What clients call the model [default: the last part of MODEL, or of the delta]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Address to listen on; one that others can reach needs --api-key-file
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,

    /// Port to listen on; 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub(crate) port: u16,

    /// File whose one line is the key that clients must send
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,

    /// Memory for the cache, such as 800MB or 2GiB [default: half of what is free once the model is loaded]
    #[arg(long, value_name = "BYTES", value_parser = kvfold_report::format::parse_bytes)]
    pub(crate) kv_memory: Option<usize>,

    /// Requests that run at the same time at most, if the memory allows
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_running: u32,

    /// Requests that wait beside them at most; more are told to come back
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_queue: u32,

    /// Tokens of a pass at most: longer passes read prompts faster, and let answers that are under way wait longer
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) step_tokens: u32,

    /// Seconds that running requests have to end when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain: u64,
}

impl ServeArgs {
    /// The model to load: a name that leads to nothing else may be that of a fetched one.
    pub(crate) fn model(&self) -> ModelArgs {
        let fetched = Path::new(FETCHED).join(&self.model);
        let is_name = !self.model.contains(['/', '\\']) && !Path::new(&self.model).exists();
        let model = match is_name && fetched.is_dir() {
            true => fetched.display().to_string(),
            false => self.model.clone(),
        };
        ModelArgs { model, delta: self.delta.clone(), precision: self.precision, cache: self.cache }
    }

    /// What clients call it.
    pub(crate) fn name(&self) -> String {
        let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let whole = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let of_model = || {
            let path = Path::new(&self.model);
            if path.is_file() { stem(path) } else { whole(&path.canonicalize().unwrap_or_else(|_| path.into())) }
        };
        let own = || self.delta.as_deref().map_or_else(of_model, stem);
        self.name.clone().or_else(own).unwrap_or_else(|| self.model.clone())
    }
}
