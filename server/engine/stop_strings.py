"""Strings that end a row as transformers' `generate` ends it, wherever in the text they begin."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StopStringCriteria


class StopStrings:
    """Stops where the last token completes one of `strings` in the text that the model continues: a string may begin
    in the prompt, and special tokens count as they are written. Raises ValueError for a tokenizer in whose
    tokens they cannot be looked for."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self._criteria = StopStringCriteria(tokenizer, list(strings))
        table, num_positions = self._criteria.embedding_vec, self._criteria.max_valid_positions * len(strings)
        self._last_ids = frozenset((table[:, num_positions:-1] > 0).any(-1).nonzero().flatten().tolist())

    def end(self, text_ids: torch.Tensor) -> bool:
        """Whether the text `[n]` ends with one of them, or within the last token."""
        return int(text_ids[-1]) in self._last_ids and bool(self._criteria(text_ids[None], None))
