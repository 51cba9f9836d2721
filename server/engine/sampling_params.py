"""How one request wants its tokens chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one row. Bounds are checked at the wire; the engine asserts them.

    `num_top_logprobs` is None when the request did not ask for log-probabilities (none are computed),
    0 for the chosen token only, k for the chosen token and the k best.
    `stop` strings are looked for in generated text only. With `include_stop` the answer keeps the stop string
    (TGI), without it the text ends before it (OpenAI) and streamed text never shows a part of it.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = True
    ignore_eos: bool = False
    num_top_logprobs: int | None = None

    def __post_init__(self) -> None:
        assert self.max_new_tokens >= 1
        assert self.temperature > 0
        assert 0 < self.top_p <= 1
        assert self.top_k >= 0
        assert self.repetition_penalty > 0
