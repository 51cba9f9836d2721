"""How one request wants its tokens chosen."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.logit_rules import NO_RULES, LogitRules
from server.engine.stop_strings import StopStrings


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one row. Bounds are checked at the wire; the engine asserts them.

    `num_top_logprobs` is None when the request did not ask for log-probabilities (none are computed),
    0 for the chosen token only, k for the chosen token and the k best.
    `stop` strings are looked for in generated text only. With `include_stop` the answer keeps the stop string
    (TGI), without it the text ends before it (OpenAI) and streamed text never shows a part of it.
    EOS is suppressed until there are `min_new_tokens`; None: until the text has the length of `rules`. With
    `ignore_eos` EOS is a token like others, and neither suppresses it. `rules` and `stop_strings` are the model's.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = True
    ignore_eos: bool = False
    num_top_logprobs: int | None = None
    rules: LogitRules = NO_RULES
    stop_strings: StopStrings | None = None

    def __post_init__(self) -> None:
        assert self.max_new_tokens >= 1
        assert self.temperature > 0
        assert 0 < self.top_p <= 1
        assert self.top_k >= 0
        assert 0 <= self.min_p <= 1
        assert self.repetition_penalty > 0

    @property
    def shapes_logits(self) -> bool:
        """Whether the greedy token may be another than the model's best."""
        return self.repetition_penalty != 1.0 or bool(self.min_new_tokens) or not self.rules.are_none
