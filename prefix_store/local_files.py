"""Artefacts on the caller's own disk: a PEFT folder, or a native file."""

from __future__ import annotations

from pathlib import Path

from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import read_native
from prefix_store.peft_format import num_tasks, read_peft
from prefix_store.prefix import ModelShape, Prefix

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_files(folder: Path) -> tuple[bytes, bytes]:
    """The two files of a PEFT folder. Raises InvalidArtefactError when one is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            others = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            raise InvalidArtefactError(f"expected {name} in {folder}, found {others or 'nothing'}")
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


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
