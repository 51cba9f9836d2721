"""What a model lets in, files apart: names of tasks, and prefixes by the base model that they name."""

from __future__ import annotations

from prefix_store.ensemble import Ensemble
from prefix_store.errors import BaseMismatchError, InvalidArtefactError
from prefix_store.names import is_task_name
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.task import UNVERIFIED, NewVersion

BASES = ("verified", "name-match", UNVERIFIED, "mismatch")  # from best to worst
BASES_TO_ACCEPT = (UNVERIFIED, "mismatch")
TO_GO_LIVE = (
    "it goes live with base_fingerprint= of the model that it was trained for (`prefixserve push` sends it where that "
    "model's folder is at hand) or with accept_base=1 (--accept-base), which takes it as it is"
)


def match_base(
    prefix: Prefix, shape: ModelShape, accept_base: bool = False, base_fingerprint: str | None = None
) -> str:
    """`verified`, `name-match`, `unverified` or, accepted, `mismatch`. `base_fingerprint` is the fingerprint that the
    caller gives for the model that the prefix was trained for. Raises BaseMismatchError."""
    names = {shape.model_name, *shape.model_aliases}
    given = [one for one in (base_fingerprint, prefix.fingerprint) if one is not None]
    others = [one for one in given if one != shape.fingerprint]
    if given and not others:
        return "verified"
    if others:
        reason = other_fingerprint(others[0], shape.fingerprint)
    elif prefix.base_model is None:
        return UNVERIFIED
    elif prefix.base_model in names:
        return "name-match"
    elif not _is_owner_and_name(prefix.base_model):
        return UNVERIFIED
    else:
        reason = f"trained for {prefix.base_model!r}, served is {' or '.join(sorted(names))!r}"
    if not accept_base:
        raise BaseMismatchError(f"base model: {reason}; accept_base=1 (--accept-base) takes it as it is")
    return "mismatch"


def other_fingerprint(trained_for: str, stored_for: str) -> str:
    return f"trained for fingerprint {trained_for[:12]}…, served is {stored_for[:12]}…"


def unverified_reason(claimed_base: str | None) -> str:
    """What keeps a file that names this base model from going live, and what to do."""
    if claimed_base is None:
        named = "the file names no base model"
    else:
        named = f"the file names {claimed_base[:200]!r}, no full name as owner/name that could be compared"
    return f"base model: {named}; {TO_GO_LIVE}"


def next_step(version: NewVersion) -> str | None:
    """What keeps a version from going live, and what to do; None where nothing does."""
    if version.may_go_live:
        return None
    if isinstance(version.content, Ensemble):
        return f"base model: a member's is {UNVERIFIED}; verify or accept the members, or give accept_base=1"
    return unverified_reason(version.claimed_base)


def check_name(task: str, shape: ModelShape) -> None:
    """Raises InvalidArtefactError for a name that a task cannot have."""
    if not is_task_name(task):
        raise InvalidArtefactError(f"a task's name must match [a-z0-9][a-z0-9._-]{{0,63}}, got {task[:80]!r}")
    if task in (shape.model_name, *shape.model_aliases):
        raise InvalidArtefactError(f"a task cannot have the model's own name {task!r}")


def _is_owner_and_name(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and "\\" not in text and owner[0] not in ".~"
