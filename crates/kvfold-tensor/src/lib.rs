//! What an array is: dtype, shape, aligned buffers; safetensors in and out.
