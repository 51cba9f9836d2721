"""Several versions that answer as one (Lester et al., 2021): members of any kind and length, and a rule."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import Layout

Rule = Literal["mean_probs", "vote"]
RULES: tuple[Rule, ...] = get_args(Rule)
KIND = "ensemble"
MAX_MEMBERS = 32


@dataclass(frozen=True)
class Member:
    """A version of a task of the same tenant, which is there as long as the ensemble is."""

    task: str
    version: int
    digest: str
    content: Layout

    def __str__(self) -> str:
        return f"{self.task}@{self.version}"


@dataclass(frozen=True)
class Ensemble:
    """`mean_probs`: one token chosen for all from the mean of their distributions. `vote`: the answer of most, of as
    many the most probable."""

    members: tuple[Member, ...]
    rule: Rule

    def __post_init__(self) -> None:
        if not 2 <= len(self.members) <= MAX_MEMBERS:
            raise InvalidArtefactError(f"an ensemble has 2 to {MAX_MEMBERS} members, got {len(self.members)}")
        if self.rule not in RULES:
            raise InvalidArtefactError(f"rule must be one of {', '.join(RULES)}, got {str(self.rule)[:40]!r}")

    @property
    def num_virtual_tokens(self) -> int:
        """Of all members together."""
        return sum(member.content.num_virtual_tokens for member in self.members)

    @property
    def digest(self) -> str:
        """sha256 of what its answers depend on: the members' content, in order, and the rule."""
        content = {"format": "prefixserve-ensemble/1", "members": [m.digest for m in self.members], "rule": self.rule}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
