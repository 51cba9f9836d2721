"""Artefacts on the caller's own disk: a PEFT folder, or a native file."""

from __future__ import annotations

from pathlib import Path

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import read_native
from prefix_store.peft_format import MAX_CONFIG_BYTES, num_tasks, read_peft
from prefix_store.prefix import ModelShape, Prefix

MAX_HEADER_BYTES = 16 * 2**20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_files(folder: Path) -> tuple[bytes, bytes]:
    """The two files of a PEFT folder. Raises InvalidArtefactError when one is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            others = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            raise InvalidArtefactError(f"expected {name} in {folder}, found {others or 'nothing'}")
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def claimed_base(path: Path) -> str | None:
    """What the PEFT folder or native file names as its base model; None where it names none, has a fingerprint of its
    own, or cannot be read as either."""
    try:
        if path.is_dir():
            found = read_json_object((path / CONFIG).read_bytes(), CONFIG, MAX_CONFIG_BYTES)
            named = found.get("base_model_name_or_path")
        else:
            with path.open("rb") as file:
                num_bytes = min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)
                found = read_json_object(file.read(num_bytes), path.name, MAX_HEADER_BYTES).get("__metadata__", {})
            named = None if "fingerprint" in found else found.get("base_model")
    except (InvalidArtefactError, OSError, TypeError, AttributeError):
        return None
    return named if isinstance(named, str) and named else None


def count_tasks(path: Path) -> int:
    """Artefacts in the folder or file: more than one only in a multitask file."""
    return num_tasks(*peft_files(path)) if path.is_dir() else 1


def read_path(path: Path, shape: ModelShape, index: int | None = None) -> Prefix:
    """The prefix of a PEFT folder or a native file. Raises InvalidArtefactError."""
    if path.is_dir():
        return read_peft(*peft_files(path), shape, index)
    if not path.is_file():
        raise InvalidArtefactError(f"expected a PEFT folder or a .safetensors file, found nothing at {path}")
    if index is not None:
        raise InvalidArtefactError("index picks a task of a PEFT multitask file; a native file has one")
    return read_native(path.read_bytes(), shape)
