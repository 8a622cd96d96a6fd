"""Writes a GGUF file's matrices in 16 bits: the same numbers and metadata, for engines that are measured with those.

Usage: dequantize.py IN.gguf OUT.gguf bf16|f16
"""

import os
import sys

import gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

TYPES = {
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
# What the writer states itself, or what is no longer so.
REPLACED = {"general.architecture", "general.file_type", "general.quantization_version"}


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in REPLACED:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)


def main(source: str, target: str, name: str) -> None:
    tensor_type, file_type = TYPES[name]
    reader = GGUFReader(source)
    part = target + ".part"
    writer = GGUFWriter(part, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        vector = len(tensor.shape) == 1
        to = GGMLQuantizationType.F32 if vector else tensor_type
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, target)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in TYPES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
