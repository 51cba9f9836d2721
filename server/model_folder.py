"""A model's folder before it is loaded: whether each file that is needed is there, whole and readable."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from server.errors import ModelFilesError

CONFIG = "config.json"
# What transformers looks for, in its order; an index names the files that the tensors are in.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"
OTHERS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_HEADER_BYTES = 100_000_000  # as safetensors allows
PICKLE = b"\x80"


def check_model_folder(path: Path) -> None:
    """Reads no tensors. Raises ModelFilesError that names the first file at fault."""
    if not (path / CONFIG).exists():
        raise ModelFilesError(f"expected {CONFIG} in the model's folder {path}, found none")
    _read_object(path / CONFIG)
    for other in OTHERS:
        if (path / other).exists():
            _read_object(path / other)
    name = next((name for name in WEIGHTS if (path / name).exists()), None)
    if name is None:
        raise ModelFilesError(f"expected weights in the model's folder {path} ({', '.join(WEIGHTS)}), found none")
    if name.endswith(INDEX):
        _check_shards(path / name)
    else:
        _check_weights(path / name)


def _check_shards(index: Path) -> None:
    files = _read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelFilesError(f"{index}: expected weight_map, an object of tensors and their files")
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ModelFilesError(f"{index}: expected the names of files beside it, got {name[:100]!r}")
        if not (index.parent / name).exists():
            raise ModelFilesError(f"{index} names {name}, which is not in the folder")
        there = _check_weights(index.parent / name)
        lost = [tensor for tensor, file in files.items() if file == name and there is not None and tensor not in there]
        if lost:
            raise ModelFilesError(f"{index.parent / name}: expected the tensor {lost[0][:100]!r}, found none")


def _check_weights(path: Path) -> set[str] | None:
    """The tensors' names; None: a pickle's are not read."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _tensors(path, file)
            if file.read(1) != PICKLE and not zipfile.is_zipfile(file):
                raise ModelFilesError(f"{path}: expected a file of torch.save, it is cut off or something else")
            return None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror or error}") from error


def _tensors(path: Path, file: BinaryIO) -> set[str]:
    num_bytes = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if num_bytes < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
        what = "is empty" if num_bytes == 0 else f"of {num_bytes} bytes is cut off or no safetensors file"
        raise ModelFilesError(f"{path} {what}")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        is_whole = num_bytes - 8 - length == end
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ModelFilesError(f"{path}: its safetensors header is damaged") from error
    if not is_whole:
        raise ModelFilesError(f"{path}: its tensors need {end} bytes, {num_bytes - 8 - length} are there")
    return set(header)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = "is empty" if path.stat().st_size == 0 else f"is no JSON: {' '.join(str(error).split())[:200]}"
        expected = "expected a tokenizer, " if path.name.startswith("tokenizer") else ""
        raise ModelFilesError(f"{expected}{path} {reason}") from error
    if not isinstance(found, dict):
        raise ModelFilesError(f"{path}: expected an object, got {type(found).__name__}")
    return found
