"""The gate before safetensors: a header is read with bounds of our own and must describe the file to the last byte.

Names and dtypes come from strangers: reasons have them as `repr` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError

MAX_HEADER_BYTES = 64 * 1024
OTHER_FORMATS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, pickle
# safetensors' names of the floating dtypes, with their bytes a value
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor's entry: `start` and `end` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]


def max_header_bytes(num_layers: int) -> int:
    """64 KiB, or what a KV prefix over every layer needs."""
    return max(MAX_HEADER_BYTES, 4096 + 2 * 192 * num_layers)


def read_header(body: bytes, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The checked header of a safetensors file. Raises InvalidArtefactError."""
    if len(body) < 8:
        raise InvalidArtefactError(f"expected a safetensors file, got {len(body)} bytes")
    num_bytes = int.from_bytes(body[:8], "little")
    if num_bytes > max_bytes:
        if body.startswith(OTHER_FORMATS):  # asked here alone: a length within the bound may begin like them
            raise InvalidArtefactError("expected a safetensors file, got a zip or a pickle; save it with safetensors")
        raise InvalidArtefactError(f"the safetensors header must be <= {max_bytes} bytes, it claims {num_bytes}")
    if num_bytes > len(body) - 8:
        raise InvalidArtefactError(
            f"the file is cut off: its header claims {num_bytes} bytes, {len(body) - 8} are there"
        )
    entries = read_json_object(body[8 : 8 + num_bytes], "the safetensors header", max_bytes)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidArtefactError("__metadata__ must be an object of strings")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    if not tensors:
        raise InvalidArtefactError("the file has no tensors")
    position = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start != position:
            raise InvalidArtefactError(f"{tensor.name[:100]!r}: expected data from byte {position}, got {tensor.start}")
        position = tensor.end
    found = len(body) - 8 - num_bytes
    if found < position:
        raise InvalidArtefactError(f"the file is cut off: its tensors need {position} bytes, {found} are there")
    if found > position:
        raise InvalidArtefactError(f"the file has {found - position} trailing bytes after its last tensor")
    return Header(tensors, metadata)


def load_tensors(body: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header `read_header` has let through. Raises InvalidArtefactError."""
    try:
        return safetensors.torch.load(body)
    except SafetensorError as error:  # stricter than we are about a header's JSON
        raise InvalidArtefactError("safetensors does not read the file: its header has unusual JSON") from error


def _tensor(name: str, entry: Any) -> TensorHeader:
    where = repr(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidArtefactError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOAT_BYTES:
        raise InvalidArtefactError(
            f"{where}: dtype must be floating ({', '.join(FLOAT_BYTES)}), got {repr(dtype)[:40]}"
        )
    if not _are_counts(shape) or not 1 <= len(shape) <= 4 or 0 in shape:
        raise InvalidArtefactError(f"{where}: expected 1 to 4 dimensions of at least 1, got {repr(shape)[:100]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InvalidArtefactError(f"{where}: data_offsets must be two numbers, got {repr(offsets)[:100]}")
    start, end = offsets
    expected = math.prod(shape) * FLOAT_BYTES[dtype]
    if end - start != expected:
        raise InvalidArtefactError(f"{where}: {dtype} {shape} takes {expected} bytes, its offsets {end - start}")
    return TensorHeader(name, dtype, tuple(shape), start, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
