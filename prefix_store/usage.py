"""What tenants used, summed by day, task and version."""

from __future__ import annotations

from dataclasses import dataclass, fields

BATCH_REMEMBERED_S = 86_400
FIRST_DAY, LAST_DAY = "0000-00-00", "9999-99-99"  # around every day


@dataclass(frozen=True)
class Usage:
    """Of one UTC day (`2026-11-25`), tenant, task (empty: the bare model) and version (0: the bare model; of an
    ensemble its own, of a composition each part's with its virtual tokens, the rest on the first). `resident_byte_s`
    is device memory times seconds."""

    day: str
    tenant: str
    task: str
    version: int
    num_requests: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    virtual_tokens: int = 0
    resident_byte_s: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.day, self.tenant, self.task, self.version)

    def __add__(self, other: Usage) -> Usage:
        assert self.key == other.key
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return Usage(*self.key, **sums)


COUNTS = tuple(field.name for field in fields(Usage))[4:]
FLOAT_COUNT = "resident_byte_s"  # the others are integers
