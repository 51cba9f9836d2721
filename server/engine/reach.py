"""How far back a layer's queries see."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reach:
    """A query at position q sees the keys at positions p <= q: those with q - p < `window`, where it is given, and
    those of its own chunk, p // `chunk` == q // `chunk`, where that is given."""

    window: int | None = None
    chunk: int | None = None

    @property
    def is_whole(self) -> bool:
        """Every query sees all that comes before it."""
        return self.window is None and self.chunk is None

    def sees(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees; the positions broadcast against each other."""
        distance = query_positions - key_positions
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.chunk is not None:
            seen &= query_positions // self.chunk == key_positions // self.chunk
        return seen


WHOLE = Reach()
