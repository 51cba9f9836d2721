"""The model that an artefact on this disk was trained for, where its folder is on this disk as well."""

from __future__ import annotations

from pathlib import Path

from server.model_files import folder_fingerprint
from server.terminal import console, fail


def base_fingerprint(path: Path, folder: str | None = None) -> str | None:
    """The fingerprint of the model in `folder`, or in the one that the artefact at `path` names (None: it names none
    that is here). Ends the command where `folder` is given and holds no model."""
    from prefix_store.local_files import claimed_base  # torch takes seconds

    named = folder or claimed_base(path)
    found = None if named is None else folder_fingerprint(named)
    if folder is not None and found is None:
        fail(f"expected a model's folder, with config.json and weights, found none at {folder}")
    if found is not None:
        text = f"base model: fingerprint {found[:12]}… of the folder {named}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return found
