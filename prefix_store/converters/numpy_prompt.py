"""Google's prompt-tuning: one `.npy` array of input embeddings, of T5 the encoder's (Lester et al., 2021)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy
import torch

from prefix_store.converters.weights_file import check_file_size
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix

MAGIC = b"\x93NUMPY"


def read_numpy_prompt(path: Path, shape: ModelShape) -> Prefix:
    """`[n, hidden]`, or `[1, n, hidden]` as a batch of one. Raises InvalidArtefactError."""
    check_file_size(path)
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote; they read the same
                version = numpy.lib.format.read_magic(file)
                read_header = {
                    (1, 0): numpy.lib.format.read_array_header_1_0,
                    (2, 0): numpy.lib.format.read_array_header_2_0,
                }[version]
                found, _, dtype = read_header(file)
        except (ValueError, KeyError, EOFError) as error:
            raise InvalidArtefactError(
                f"{path.name}: expected a .npy file of format 1 or 2, its header is not one"
            ) from error
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise InvalidArtefactError(f"{path.name}: dtype must be float16, float32 or float64, got {dtype.str}")
        sizes = list(found[1:] if len(found) == 3 and found[0] == 1 else found)
        if len(sizes) != 2 or sizes[1] != shape.hidden_size or sizes[0] < 1:
            hidden = shape.hidden_size
            raise InvalidArtefactError(
                f"{path.name}: expected [num_virtual_tokens, {hidden}] or [1, num_virtual_tokens, {hidden}], "
                f"got {list(found)}"
            )
        needed, there = math.prod(found) * dtype.itemsize, path.stat().st_size - file.tell()
        if needed != there:
            raise InvalidArtefactError(f"{path.name}: {list(found)} takes {needed} bytes, {there} are there")
        file.seek(0)
        array = numpy.load(file, allow_pickle=False)
    native = numpy.ascontiguousarray(array.reshape(sizes), dtype=dtype.newbyteorder("="))
    return Prefix("soft", embeddings=torch.from_numpy(native), is_seq2seq=shape.is_encoder_decoder)
