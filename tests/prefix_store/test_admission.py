"""What a model lets in needs its measures alone."""

from __future__ import annotations

import pytest
import torch

from prefix_store.admission import check_name, match_base
from prefix_store.errors import BaseMismatchError, InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix

SHAPE = ModelShape(2, 2, 8, 32, 100, 512, torch.float32, "owner/tiny", "f" * 64, ("mini",))


def named(base_model: str | None = None, fingerprint: str | None = None) -> Prefix:
    return Prefix("soft", embeddings=torch.zeros(1, 32), base_model=base_model, fingerprint=fingerprint)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (named(), "unverified"),
        (named("owner/tiny"), "name-match"),
        (named("mini"), "name-match"),
        (named("./a/folder"), "unverified"),
        (named("tiny"), "unverified"),
        (named("owner/other", "f" * 64), "verified"),
    ],
)
def test_base_that_is_let_in(prefix: Prefix, expected: str) -> None:
    assert match_base(prefix, SHAPE) == expected


@pytest.mark.parametrize("prefix", [named("owner/other"), named("owner/tiny", "a" * 64)])
def test_base_that_is_another(prefix: Prefix) -> None:
    with pytest.raises(BaseMismatchError, match="served is "):
        match_base(prefix, SHAPE)
    assert match_base(prefix, SHAPE, accept_base=True) == "mismatch"


@pytest.mark.parametrize("name", ["owner/tiny", "mini", "", "A", "a b", "a\n", ".a", "a" * 65])
def test_name_that_no_task_has(name: str) -> None:
    with pytest.raises(InvalidArtefactError):
        check_name(name, SHAPE)
    check_name("films", SHAPE)
