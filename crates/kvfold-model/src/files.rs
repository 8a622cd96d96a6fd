//! Where the files of a model come from: a directory, or the binary itself.
//!
//! Both are read by the same code above this module, so the embedded model is checked like any other and a test with it is
//! a test of the loader.

use std::borrow::Cow;
use std::io;
use std::path::{MAIN_SEPARATOR, PathBuf};

use kvfold_tensor::TensorFile;

use crate::embedded;
use crate::error::{ModelError, Result};

/// The source of a model's files.
pub(crate) enum Files {
    Dir(PathBuf),
    Embedded(&'static str, embedded::Files),
}

impl Files {
    /// Finds the model called `model`: an embedded one, or a directory.
    pub(crate) fn find(model: &str) -> Result<Files> {
        if let Some(name) = embedded::NAMES.iter().find(|&&name| name == model)
            && let Some(files) = embedded::find(name)
        {
            return Ok(Files::Embedded(name, files));
        }
        let dir = PathBuf::from(model);
        if dir.is_dir() {
            return Ok(Files::Dir(dir));
        }
        Err(ModelError::NoModel { model: model.into(), embedded: embedded::NAMES.join(", ") })
    }

    /// What errors call the file `name`.
    pub(crate) fn label(&self, name: &str) -> String {
        match self {
            Files::Dir(dir) => dir.join(name).display().to_string(),
            Files::Embedded(model, _) => format!("(embedded) {model}{MAIN_SEPARATOR}{name}"),
        }
    }

    /// The content of the file `name`, if there is one.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Files::Dir(dir) => match std::fs::read(dir.join(name)) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(ModelError::Io { file: self.label(name), action: "read", source }),
            },
            Files::Embedded(..) => Ok(self.embedded(name).map(Cow::Borrowed)),
        }
    }

    /// The content of the file `name`, or an error with a `hint` at what to do.
    pub(crate) fn need(&self, name: &str, hint: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| ModelError::MissingFile { file: self.label(name), hint: hint.into() })
    }

    /// Whether there is a file `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Files::Dir(dir) => dir.join(name).exists(),
            Files::Embedded(..) => self.embedded(name).is_some(),
        }
    }

    /// The tensors of the safetensors file `name`. From a directory they are read into place, without a second copy.
    pub(crate) fn tensors(&self, name: &str) -> Result<TensorFile> {
        match self {
            Files::Dir(dir) => Ok(kvfold_tensor::read(&dir.join(name))?),
            Files::Embedded(..) => {
                let bytes = self.need(name, "the binary was built without it")?;
                Ok(kvfold_tensor::read_bytes(&bytes, &self.label(name))?)
            }
        }
    }

    fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Files::Dir(_) => None,
            Files::Embedded(_, files) => files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes),
        }
    }
}
