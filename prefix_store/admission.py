"""What a model lets in, files apart: names of tasks, and prefixes by the base model that they name."""

from __future__ import annotations

from prefix_store.errors import BaseMismatchError, InvalidArtefactError
from prefix_store.names import is_task_name
from prefix_store.prefix import ModelShape, Prefix

BASES = ("verified", "name-match", "unverified", "mismatch")  # from best to worst


def match_base(prefix: Prefix, shape: ModelShape, accept_base: bool = False) -> str:
    """`verified`, `name-match`, `unverified` or, accepted, `mismatch`. Raises BaseMismatchError."""
    names = {shape.model_name, *shape.model_aliases}
    if prefix.fingerprint is not None:
        if prefix.fingerprint == shape.fingerprint:
            return "verified"
        reason = f"trained for fingerprint {prefix.fingerprint[:12]}…, served is {shape.fingerprint[:12]}…"
    elif prefix.base_model is None:
        return "unverified"
    elif prefix.base_model in names:
        return "name-match"
    elif not _is_owner_and_name(prefix.base_model):
        return "unverified"
    else:
        reason = f"trained for {prefix.base_model!r}, served is {' or '.join(sorted(names))!r}"
    if not accept_base:
        raise BaseMismatchError(f"base model: {reason}; accept_base=1 (--accept-base) stores it all the same")
    return "mismatch"


def check_name(task: str, shape: ModelShape) -> None:
    """Raises InvalidArtefactError for a name that a task cannot have."""
    if not is_task_name(task):
        raise InvalidArtefactError(f"a task's name must match [a-z0-9][a-z0-9._-]{{0,63}}, got {task[:80]!r}")
    if task in (shape.model_name, *shape.model_aliases):
        raise InvalidArtefactError(f"a task cannot have the model's own name {task!r}")


def _is_owner_and_name(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and "\\" not in text and owner[0] not in ".~"
