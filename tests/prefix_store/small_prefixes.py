"""A tiny model's measures, and prefixes for it that are made in no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from prefix_store.ensemble import Ensemble
from prefix_store.prefix import Layout, ModelShape, Prefix
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.sweep import SweepRules
from prefix_store.task import ANY, NewVersion
from prefix_store.task_changes import Published, add_version
from prefix_store.tenants import Limits, Tenant

HEADS, DIM, HIDDEN = 2, 8, 32
SHAPE = ModelShape(2, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64)
OURS, THEIRS = "ours", "theirs"
AT_ONCE = SweepRules(min_age_s=0, grace_s=0, max_share=1.0)
Open = Callable[[], Registry]


def soft(seed: int = 0, n: int = 4) -> Prefix:
    return Prefix("soft", embeddings=torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed)))


def publish(
    store: PrefixStore,
    task: str,
    seed: int = 0,
    n: int = 4,
    tenant: str = OURS,
    activate: bool | None = None,
    within_limits: bool = False,
) -> Published:
    base = "name-match"
    return store.publish(tenant, task, soft(seed, n), base=base, activate=activate, within_limits=within_limits)


def make_tenants(registry: Registry, *names: str, limits: Limits | None = None) -> None:
    """Tenants that are there, with these limits from now on."""
    for name in names:
        registry.update_tenant(name, lambda found, name=name: replace(found or Tenant(name), limits=limits or Limits()))  # type: ignore[misc]


def ensemble(store: PrefixStore, task: str, *members: str, rule: str = "mean_probs", tenant: str = OURS) -> Published:
    return store.publish_ensemble(tenant, task, store.make_ensemble(tenant, members, rule))


def new_version(digest: str, content: Layout | Ensemble) -> NewVersion:
    return NewVersion(digest, content, 10, "verified", "tiny", "f" * 64, "")


def add(registry: Registry, task: str, new: NewVersion, tenant: str = OURS) -> Published:
    """Without a file."""
    change = partial(add_version, name=task, new=new, activate=None, precondition=ANY, within_limits=False, now_s=1.5)
    return registry.change(tenant, change)
