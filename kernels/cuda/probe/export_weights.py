"""Writes linear layers of Hugging Face checkpoints as one raw file for gpu_probe --weights.

    export_weights.py OUTPUT CHECKPOINT_DIR...

Of every checkpoint the first, the middle and the last block's matrices, in bf16: some tens of
megabytes. The file, little endian: "NESTORPW"; u64 count; for each layer u64 length and the name,
i64 m, i64 n, and m · n bf16 values.
"""

import json
import pathlib
import re
import struct
import sys

import numpy as np

BLOCK = re.compile(r"\.(?:layers|layer|h)\.(\d+)\.")


def tensors(directory: pathlib.Path):
    """(name, dtype, shape, bytes) of every tensor in the directory's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{directory}: no safetensors file")
    for path in files:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                yield name, entry["dtype"], entry["shape"], file.read(end - begin)


def to_bf16(dtype: str, data: bytes) -> bytes:
    if dtype == "BF16":
        return data
    if dtype == "F16":
        bits = np.frombuffer(data, np.float16).astype(np.float32).view(np.uint32)
    elif dtype == "F32":
        bits = np.frombuffer(data, np.uint32)
    else:
        raise SystemExit(f"no conversion from {dtype} to bf16")
    # Round to nearest, ties to even. Weights hold no NaN.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def chosen(directory: pathlib.Path) -> list[tuple]:
    found = [(int(match.group(1)), name, dtype, shape, data)
             for name, dtype, shape, data in tensors(directory)
             if len(shape) == 2 and (match := BLOCK.search("." + name))]
    if not found:
        raise SystemExit(f"{directory}: no matrix of a numbered block")
    last = max(block for block, *_ in found)
    return sorted(entry for entry in found if entry[0] in {0, last // 2, last})


def main() -> int:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    layers = []
    for argument in sys.argv[2:]:
        directory = pathlib.Path(argument)
        layers += [(f"{directory.name} {name.removesuffix('.weight')}", shape, to_bf16(dtype, data))
                   for _, name, dtype, shape, data in chosen(directory)]
    with open(sys.argv[1], "wb") as file:
        file.write(b"NESTORPW" + struct.pack("<Q", len(layers)))
        for name, (m, n), data in layers:
            encoded = name.encode()
            file.write(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<qq", m, n) + data)
    print(f"{len(layers)} layers, {pathlib.Path(sys.argv[1]).stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
