"""What counts as a version's own fault, three of which take it out of service, and what does not: memory that is short,
a step that fails, a limit that an operator lowers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from server.api.bill import Bill
from server.api.faults import MAX_FAULTS
from server.engine import recent_failures
from server.engine.engine import Engine
from server.engine.sequence import PrefixRef
from tests.byte_model import HIDDEN
from tests.conftest import NAME, Served, make_tenant, native
from tests.waiting import eventually

SHORT: list[Exception] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."),
]
NUM_ASKED = MAX_FAULTS + 2


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Bill]:
    """Requests whose fault was noted, if it is one, and its version taken out of service."""
    found: list[Bill] = []
    settle = Bill._settle

    async def settle_and_tell(bill: Bill) -> None:
        await settle(bill)
        found.append(bill)

    monkeypatch.setattr(Bill, "_settle", settle_and_tell)
    return found


def tenant_of(keyed: Served, name: str, first: bytes | None = None, second: bytes | None = None) -> Served:
    """A new tenant with a task of two versions, the second active."""
    tenant = make_tenant(keyed, name)
    for body in (first or native(1), second or native(2)):
        assert tenant.put("t", body).status_code == 201
    return tenant


def ask(tenant: Served, settled: list[Bill], num: int = NUM_ASKED) -> list[int]:
    """The statuses, once all is settled."""
    num_before = len(settled)
    statuses = [tenant.generate("x", "t", max_new_tokens=1).status_code for _ in range(num)]
    eventually(lambda: len(settled) == num_before + num)
    return statuses


def in_service(tenant: Served) -> tuple[int, list[int]]:
    """The active version, and those that are out of service."""
    found = tenant.http.get("/v1/prefixes/t").json()
    return found["active"], found["quarantined"]


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["reading", "copying"])
def test_a_load_that_finds_no_memory_is_not(
    keyed: Served, settled: list[Bill], monkeypatch: pytest.MonkeyPatch, fault: Exception, place: str
) -> None:
    """It is tried once, and all who ask are told of it."""
    tenant = tenant_of(keyed, f"short-{place}-{SHORT.index(fault)}")
    engine = keyed.state.engine._engine
    num_failed = engine.residents.counts.num_failed_loads

    def load(*arguments: object) -> Prefix:
        raise fault

    with monkeypatch.context() as short:
        if place == "reading":
            short.setattr(engine, "_load_prefix", load)
        else:
            short.setattr(engine.runner, "load", load)
        assert ask(tenant, settled) == [424] * NUM_ASKED
    assert engine.residents.counts.num_failed_loads == num_failed + 1
    assert in_service(tenant) == (2, [])
    monkeypatch.setattr(recent_failures, "REMEMBERED_S", 0.0)
    answer = tenant.generate("x", "t", max_new_tokens=1)
    assert (answer.status_code, answer.headers["X-Prefix-Version"]) == (200, "2")


@pytest.mark.parametrize("fault", [MemoryError(), ValueError("a bug")], ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["schedule", "run", "append"])
def test_a_step_or_a_row_that_fails_is_not(
    keyed: Served, settled: list[Bill], monkeypatch: pytest.MonkeyPatch, fault: Exception, place: str
) -> None:
    tenant = tenant_of(keyed, f"{place}-{type(fault).__name__.lower()}")
    engine = keyed.state.engine._engine
    owner = {"schedule": engine.scheduler, "run": engine.runner, "append": engine}[place]
    name = {"append": "_append"}.get(place, place)
    whole = getattr(owner, name)

    def fail(*arguments: object) -> object:
        if engine.has_work:
            raise fault
        return whole(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        assert ask(tenant, settled) == [500] * NUM_ASKED
    assert in_service(tenant) == (2, [])


def test_a_lowered_limit_is_not(keyed: Served, settled: list[Bill]) -> None:
    """Of a version that is cold: what is resident stays."""
    tenant = tenant_of(keyed, "lowered")
    limits = {"limits": {"max_resident_bytes": 1}}
    assert keyed.http.put("/v1/tenants/lowered", json=limits).is_success
    eventually(lambda: keyed.state.engine._engine.policies.of("lowered").max_resident_bytes == 1)
    assert ask(tenant, settled) == [422] * NUM_ASKED
    assert in_service(tenant) == (2, [])


def with_nan(prefix: Prefix) -> Prefix:
    if prefix.embeddings is not None:
        return replace(prefix, embeddings=torch.full_like(prefix.embeddings, float("nan")))
    layers = {layer: (key, torch.full_like(value, float("nan"))) for layer, (key, value) in prefix.layers.items()}
    return replace(prefix, layers=layers)


def of_another_layout(prefix: Prefix) -> Prefix:
    return replace(prefix, layers={layer: (k[:, 1:], v[:, 1:]) for layer, (k, v) in prefix.layers.items()})


def not_readable(prefix: Prefix) -> Prefix:
    raise InvalidArtefactError("__metadata__.format must be 'prefixserve', got none")


def soft(seed: int) -> bytes:
    embeddings = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return write_native(Prefix("soft", embeddings=embeddings, base_model=NAME))


@pytest.mark.parametrize(
    ("name", "make", "spoil", "status"),
    [
        ("logits", native, with_nan, 500),
        ("keys", soft, with_nan, 424),
        ("layout", native, of_another_layout, 424),
        ("artefact", native, not_readable, 424),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_version_is_itself_counts(
    keyed: Served,
    settled: list[Bill],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[int], bytes],
    spoil: Callable[[Prefix], Prefix],
    status: int,
) -> None:
    """A damaged file is in `test_tenants.py`."""
    tenant = tenant_of(keyed, f"bad-{name}", make(11), make(12))
    digest = tenant.http.get("/v1/prefixes/t").json()["versions"][1]["digest"]
    engine: Engine = keyed.state.engine._engine
    load = engine._load_prefix

    def load_bad(ref: PrefixRef) -> Prefix:
        return spoil(load(ref)) if ref.digest == digest else load(ref)

    monkeypatch.setattr(engine, "_load_prefix", load_bad)
    assert ask(tenant, settled, MAX_FAULTS) == [status] * MAX_FAULTS
    assert in_service(tenant) == (1, [2])
    assert tenant.generate("x", "t", max_new_tokens=1).status_code == 200
