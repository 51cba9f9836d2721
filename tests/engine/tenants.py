"""Requests of several tenants to one engine with a tiny Llama in fp32."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import Prefix
from server.engine.attention import NAME
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, StepOutput
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, block_bytes, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, Layout, PrefixRef, Sequence
from tests.tiny_models import FAMILIES, VOCAB, letter_tokenizer

NUM_VIRTUAL = 5  # tokens of a prefix, which take one block


class LateLoads:
    """An executor whose loads run when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, load: Callable[[], None]) -> None:
        self.waiting.append(load)

    def run(self, count: int | None = None) -> None:
        for load in self.waiting[:count]:
            load()
        del self.waiting[:count]


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)


class Tenants:
    """`started` are the sequences in the order in which they ran first."""

    def __init__(
        self,
        model: Any,
        *,
        kv_tokens: int = 4096,
        prefix_blocks: int = 64,
        max_rows: int = 4,
        max_step_tokens: int = 48,
        executor: Any = None,
    ) -> None:
        self._shape = measure_shape(model, "tiny", "none")
        num_blocks, num_prefix_blocks = split_pool(kv_tokens, prefix_blocks * BLOCK_SIZE)
        self.engine = Engine(
            ModelRunner(model, self._shape, KVBlocks(self._shape, num_blocks, torch.device("cpu"))),
            self.load,
            num_prefix_blocks=num_prefix_blocks,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            executor=executor,
        )
        self._choose = random.Random(1)
        self._num_added = 0
        self.started: list[Sequence] = []

    @property
    def block_bytes(self) -> int:
        return block_bytes(self._shape)

    def ref(self, name: str, tenant_id: str = "", num_tokens: int = NUM_VIRTUAL, **fields: Any) -> PrefixRef:
        return PrefixRef(name, Layout(num_decoder_tokens=num_tokens, **fields), tenant_id)

    def load(self, ref: PrefixRef) -> Prefix:
        generator = torch.Generator().manual_seed(zlib.crc32(ref.digest.encode()))
        num_tokens, shape = ref.layout.num_decoder_tokens, self._shape
        if ref.layout.kind == "soft":
            made = torch.randn(num_tokens, shape.hidden_size, generator=generator)
            return Prefix("soft", embeddings=made, placement=ref.layout.placement)
        size = (shape.num_layers, 2, shape.num_kv_heads, num_tokens, shape.head_dim)
        made = torch.randn(size, generator=generator)
        return Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in range(shape.num_layers)})

    def add(
        self,
        tenant_id: str,
        *members: Composition,
        num_in: int = 6,
        num_out: int = 4,
        prompt: list[int] | None = None,
    ) -> Sequence:
        """A request with a prompt of its own, of the bare model where it names no members."""
        self._num_added += 1
        made = [self._choose.randrange(3, VOCAB) for _ in range(num_in)] if prompt is None else prompt
        params = SamplingParams(max_new_tokens=num_out, ignore_eos=True)
        detokenizer = Detokenizer(letter_tokenizer())
        sequence = Sequence(f"r{self._num_added}", made, params, detokenizer, members or ((),), tenant_id=tenant_id)
        self.engine.add(sequence)
        return sequence

    def add_many(self, tenant_id: str, count: int, *, max_in: int = 12, max_out: int = 8) -> list[Sequence]:
        """Of random lengths."""
        return [
            self.add(
                tenant_id, num_in=self._choose.randrange(1, max_in + 1), num_out=self._choose.randrange(1, max_out + 1)
            )
            for _ in range(count)
        ]

    def step(self) -> list[StepOutput]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        for sequence in (*(output.sequence for output in outputs), *self.engine.scheduler.running):
            if sequence.started_s is not None and sequence not in self.started:
                self.started.append(sequence)
        return outputs

    def finish(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            assert all(output.error is None for output in self.step())
        raise AssertionError(f"sequences are left after {max_steps} steps")

    def answer(self, tenant_id: str, *members: Composition, **fields: Any) -> Sequence:
        sequence = self.add(tenant_id, *members, **fields)
        self.finish()
        return sequence

    def is_backlogged(self, *tenant_ids: str) -> bool:
        waiting = {sequence.tenant_id for sequence in self.engine.scheduler.waiting}
        return waiting >= {*tenant_ids}

    def served(self, tenant_id: str) -> float:
        """Tokens, those read once and those generated twice."""
        return self.engine.scheduler.waiting.service.get(tenant_id, 0.0)

    def residents(self, refs: Iterable[PrefixRef]) -> list[str]:
        """The digests of those that are resident."""
        return [ref.digest for ref in refs if self.engine.residents.get(ref.key) is not None]
