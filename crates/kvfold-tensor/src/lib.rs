//! What an array is: dtype, shape, aligned buffers; safetensors in and out, GGUF and PyTorch in.
//!
//! This crate is the floor of the house. It holds numbers *at rest*: a [`HostTensor`] is what a weight file contains and
//! what a checkpoint is made of, and nothing here adds or multiplies. Arithmetic happens in `kvfold-kernels`, on buffers
//! of the backend's own type, which are filled from host tensors once and never look back.
//!
//! Three rules follow from that role:
//!
//! * **Only float dtypes exist.** The weights of a Llama are nothing else. An integer or 8-bit tensor is a leftover that
//!   nothing needs, or it means a quantized model: the reader leaves it out and lists it by name, instead of converting it
//!   to something that loads and babbles, and the loader of models tells the two apart.
//! * **Bytes are the truth.** A tensor keeps the dtype it was stored in until somebody asks for another, so loading and
//!   saving a bfloat16 model returns the same bits.
//! * **Files are hostile until checked, and complete once visible.** Every length is bounded by the size of the file before
//!   memory is taken for it, and every file is written beside its final name and moved there only when it is on the disk.

#[cfg(target_endian = "big")]
compile_error!(
    "tensor files are little-endian and kvfold reads their bytes in place: big-endian machines are not supported"
);

mod aligned;
pub mod atomic;
mod dtype;
mod error;
pub mod gguf;
mod host;
pub mod safetensors;
pub mod torch;

pub use self::safetensors::{TensorFile, read, read_bytes, write};
pub use aligned::AlignedBytes;
pub use dtype::DType;
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use host::HostTensor;
pub use torch::TorchFile;
