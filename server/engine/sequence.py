"""One row: a request's tokens, its place in KV memory and everything else that is a fact of that request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.engine.detokenizer import Detokenizer
    from server.engine.resident_prefixes import ResidentPrefix

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True)
class PrefixRef:
    """Which prefix a row sees. Its length is known before it is loaded, so admission can count it."""

    digest: str
    num_virtual_tokens: int


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. `text` is what became complete with it, which may be nothing."""

    index: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    special: bool
    finish_reason: FinishReason | None


class Sequence:
    """A row from arrival to its last token. Text token i holds position `num_virtual_tokens + i`."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        detokenizer: Detokenizer,
        prefix: PrefixRef | None = None,
    ) -> None:
        assert prompt_token_ids, "a prompt has at least one token"
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.detokenizer = detokenizer
        self.prefix = prefix
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0  # text tokens whose K and V are in the pool
        self.num_scheduled_tokens = 0  # of them, how many this step computes
        self.block_table: list[int] = []
        self.resident: ResidentPrefix | None = None
        self.finish_reason: FinishReason | None = None
        self.num_preemptions = 0
        self.arrival_s = time.monotonic()
        self.started_s: float | None = None
        self.generator: torch.Generator | None = None
        if sampling_params.do_sample:
            self.generator = torch.Generator()
            if sampling_params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling_params.seed)

    @property
    def num_virtual_tokens(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_text_tokens(self) -> int:
        """Text tokens that can ever need K and V: the last generated one needs none."""
        return self.num_prompt_tokens + self.sampling_params.max_new_tokens - 1
