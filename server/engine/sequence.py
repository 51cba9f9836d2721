"""A request in the engine (`Sequence`) and its rows of the batch: their text, their place in KV memory, what they see.

A sequence has one row, or N where an ensemble's members choose every token together.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from prefix_store.prefix import Layout
from server.engine.kv_blocks import BLOCK_SIZE, num_blocks_for
from server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.engine.detokenizer import Detokenizer, Place
    from server.engine.resident_prefix import ResidentPrefix

FinishReason = Literal["length", "eos_token", "stop_sequence"]
Positions = npt.NDArray[np.int64]
NEVER = 2**30  # the position of a slot that no query may see


@dataclass(frozen=True)
class PrefixRef:
    """A prefix that a row sees. Its layout is known before it is loaded, so admission can count it."""

    digest: str
    layout: Layout
    tenant_id: str = ""  # the owner's

    @cached_property
    def key(self) -> str:
        """Its name on the device, where equal content of two tenants is two prefixes."""
        return f"{self.tenant_id}/{self.digest}" if self.tenant_id else self.digest


Composition = tuple[PrefixRef, ...]  # of one row, in order; empty: the bare model


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. `text` is what became complete with it, which may be nothing. `place` is known where
    log-probabilities were asked for."""

    index: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    special: bool
    finish_reason: FinishReason | None
    place: Place | None = None


@dataclass(frozen=True)
class Span:
    """Keys that rows share: part `part` of the row's prefix number `index`, from slot `start` of the row's keys on."""

    index: int
    part: str
    start: int
    num_tokens: int


class Context:
    """The keys of one attention of one row: slots in blocks, the shared spans first, then the row's own tokens.

    `slot_positions` `[slots]` holds the position of the token in every slot, NEVER where a span ends inside its block.
    Keys of prefixes carry no position of their own; theirs only decides who sees them.
    """

    def __init__(self, shared: Iterable[tuple[int, str, int, int]], own_positions: Positions) -> None:
        spans, pieces, start = [], [], 0
        for index, part, num_tokens, position in shared:
            spans.append(Span(index, part, start, num_tokens))
            piece = np.full(num_blocks_for(num_tokens) * BLOCK_SIZE, NEVER)
            piece[:num_tokens] = np.arange(position, position + num_tokens)
            pieces.append(piece)
            start += len(piece)
        self.spans = tuple(spans)
        self.num_shared_slots = start
        own = np.full(num_blocks_for(len(own_positions)) * BLOCK_SIZE, NEVER)
        own[: len(own_positions)] = own_positions
        self.own_positions = own_positions
        self.slot_positions: Positions = np.concatenate((*pieces, own))


class Row:
    """One stream of the batch. Its text holds positions from the prefixes' end on; a KV infix leaves a gap after the
    prompt, and its separator is the first token to see it. A negative token id -1-i stands for embedding i of the
    row's soft prompt, where that is part of the stream. Rows of different tenants share no text."""

    def __init__(
        self,
        prefixes: Composition,
        prompt: list[int],
        decoder_start_ids: tuple[int, ...],
        max_new_tokens: int,
        tenant_id: str = "",
    ) -> None:
        self.prefixes = prefixes
        self.residents: list[ResidentPrefix] = []
        self.token_ids = list(prompt)
        self.encoder_ids: list[int] = []
        self.num_computed_tokens = 0  # whose K and V are in the pool
        self.num_scheduled_tokens = 0  # of them, how many this step computes
        self.is_encoded = False
        self.is_soft = any(ref.layout.kind == "soft" for ref in prefixes)
        self.block_table: list[int] = []
        self.num_registered_blocks = 0  # of the block table, the first ones, which other rows may hold too
        self.cross_table: list[int] = []
        self._hash_chain = [hashlib.sha256(repr((tenant_id, prefixes)).encode()).digest()]
        gap = 0
        for ref in prefixes:
            layout = ref.layout
            if layout.num_encoder_tokens and layout.stays_embeddings:
                self.encoder_ids = _placeholders(layout.num_encoder_tokens)
            elif layout.placement == "infix" and layout.stays_embeddings:
                self.token_ids += _placeholders(layout.num_decoder_tokens)
            elif layout.placement == "infix":
                assert layout.separator is not None
                self.token_ids.append(layout.separator)
                gap = layout.num_decoder_tokens
        # Of a decoder-only model's text, the tokens read with a soft prompt: PEFT hands on their embeddings, not ids.
        self.num_embedded_tokens = len(self.token_ids) if self.is_soft and not decoder_start_ids else 0
        if decoder_start_ids:
            self.encoder_ids += prompt
            self.token_ids = list(decoder_start_ids)
        num_front = self._num_shared("decoder")
        steps = np.arange(len(self.token_ids) + max_new_tokens - 1)
        text = num_front + np.where(steps < len(prompt), steps, steps + gap) if gap else num_front + steps
        infix_position = num_front + len(prompt)
        self.context = Context(self._shared("decoder", infix_position), text)
        encoded = self._num_shared("encoder") + np.arange(len(self.encoder_ids))
        self.encoder_context = Context(self._shared("encoder"), encoded)
        self.cross_context = Context(self._shared("cross"), encoded)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_unencoded_tokens(self) -> int:
        """An encoder reads its text in one step: every token sees every other."""
        return 0 if self.is_encoded else len(self.encoder_ids)

    @property
    def num_virtual_tokens(self) -> int:
        return sum(ref.layout.num_virtual_tokens for ref in self.prefixes)

    @property
    def max_blocks(self) -> int:
        """Blocks that the row can ever need for itself."""
        return num_blocks_for(len(self.context.own_positions)) + num_blocks_for(len(self.encoder_ids))

    @property
    def num_reusable_blocks(self) -> int:
        """Full blocks of the text known before its last token. None of a text that depends on an encoder's."""
        return 0 if self.encoder_ids else (len(self.token_ids) - 1) // BLOCK_SIZE

    @property
    def unregistered_blocks(self) -> list[int]:
        """That no other row may hold."""
        return [*self.block_table[self.num_registered_blocks :], *self.cross_table]

    @property
    def is_ready(self) -> bool:
        """All its prefixes are held and loaded."""
        return len(self.residents) == len(self.prefixes) and all(r.state == "ready" for r in self.residents)

    @property
    def embeddings(self) -> torch.Tensor | None:
        """Of the soft prompt in the stream, `[n, hidden_size]`."""
        return next((r.embeddings for r in self.residents if r.embeddings is not None), None)

    def shared_blocks(self, context: Context) -> list[int]:
        return [block for span in context.spans for block in self.residents[span.index].part_tables[span.part]]

    def block_hash(self, index: int) -> bytes:
        """Of block `index` of the text, which is full: sha256 over all that its K and V depend on. That is the tenant
        (by choice), the prefixes in their order, and the tokens and their positions up to its end."""
        chain = self._hash_chain
        while len(chain) <= index + 1:
            end = len(chain) * BLOCK_SIZE
            token_ids = array("q", self.token_ids[end - BLOCK_SIZE : end])
            positions = self.context.own_positions[end - BLOCK_SIZE : end]
            chain.append(hashlib.sha256(chain[-1] + token_ids.tobytes() + positions.tobytes()).digest())
        return chain[index + 1]

    def drop_computed(self) -> None:
        """Everything has to be computed again."""
        self.block_table, self.cross_table = [], []
        self.num_computed_tokens = self.num_scheduled_tokens = self.num_registered_blocks = 0
        self.is_encoded = False

    def _num_shared(self, part: str) -> int:
        """Tokens of KV prefixes, infixes apart."""
        return sum(_length(ref.layout, part) for ref in self.prefixes if ref.layout.placement == "prefix")

    def _shared(self, part: str, infix_position: int = 0) -> Iterable[tuple[int, str, int, int]]:
        position = 0
        for index, ref in enumerate(self.prefixes):
            num_tokens = _length(ref.layout, part)
            if not num_tokens:
                continue
            if ref.layout.placement == "infix":
                yield index, part, num_tokens, infix_position
            else:
                yield index, part, num_tokens, position
                position += num_tokens


def _placeholders(num_tokens: int) -> list[int]:
    return [-1 - i for i in range(num_tokens)]


def _length(layout: Layout, part: str) -> int:
    """Of the KV that rows share; embeddings in the stream are the row's own."""
    return 0 if layout.stays_embeddings else int(getattr(layout, f"num_{part}_tokens"))


class Sequence:
    """A request from arrival to its last token. It reuses text of its own tenant only: `num_cached_tokens` counts, at
    its first start, the prompt tokens whose K and V every one of its rows took from earlier text."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        detokenizer: Detokenizer,
        members: tuple[Composition, ...] = ((),),
        decoder_start_ids: tuple[int, ...] = (),
        tenant_id: str = "",
    ) -> None:
        assert prompt_token_ids, "a prompt has at least one token"
        assert members
        self.request_id = request_id
        self.tenant_id = tenant_id
        self.sampling_params = sampling_params
        self.detokenizer = detokenizer
        self.prompt_token_ids = prompt_token_ids
        self.output_token_ids: list[int] = []
        given = decoder_start_ids or prompt_token_ids
        self.num_given_tokens = len(given)  # of the text that the model continues
        self._text_ids = np.empty(len(given) + sampling_params.max_new_tokens, dtype=np.int64)
        self._text_ids[: len(given)] = given
        self.prefixes = tuple(ref for prefixes in members for ref in prefixes)  # of all rows
        max_new_tokens = sampling_params.max_new_tokens
        self.rows = tuple(
            Row(prefixes, prompt_token_ids, decoder_start_ids, max_new_tokens, tenant_id) for prefixes in members
        )
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
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

    def append(self, token_id: int) -> None:
        self._text_ids[self.num_given_tokens + self.num_generated_tokens] = token_id
        self.output_token_ids.append(token_id)
        for row in self.rows:
            row.token_ids.append(token_id)

    def rewind_draws(self) -> None:
        """A step that failed may have drawn for a token that it did not give: the next one draws it again."""
        if self.generator is not None:
            self.generator.manual_seed(self.generator.initial_seed())
            for _ in range(self.num_generated_tokens):
                torch.rand((), generator=self.generator)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_virtual_tokens(self) -> int:
        """Of all its rows."""
        return sum(row.num_virtual_tokens for row in self.rows)

    @property
    def text_ids(self) -> torch.Tensor:
        """`[n]`, the text that the model continues, without virtual tokens: prompt and output, or what the decoder of
        an encoder-decoder has read."""
        return torch.from_numpy(self._text_ids[: self.num_given_tokens + self.num_generated_tokens])

    @cached_property
    def encoder_text_ids(self) -> torch.Tensor | None:
        """`[num_prompt_tokens]`, what rules about the input see: the prompt. None where an encoder reads a soft prompt
        before it: PEFT's `generate` then has embeddings in place of ids, and such rules do not hold."""
        if any(row.encoder_ids and row.encoder_ids[0] < 0 for row in self.rows):
            return None
        return torch.tensor(self.prompt_token_ids)

    @property
    def max_blocks(self) -> int:
        return sum(row.max_blocks for row in self.rows)

    @property
    def is_sampled(self) -> bool:
        """Every row computes its last known token in this step."""
        return all(row.num_uncomputed_tokens == row.num_scheduled_tokens for row in self.rows)
