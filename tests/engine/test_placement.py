"""Every tensor of a step is on the model's device. The device is meta, under a mode that refuses to mix devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_store.prefix import Layers, ModelShape, Prefix, Reads
from server.engine import batch as batch_module
from server.engine import engine as engine_module
from server.engine.attention import NAME
from server.engine.batch import AttentionGroup, Batch
from server.engine.detokenizer import Detokenizer
from server.engine.kv_blocks import BlockIndex, KVBlocks, split_pool
from server.engine.logit_rules import LogitRules
from server.engine.model_families import prepare
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner, model_class
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from tests.cases import WholeSteps
from tests.tiny_models import FAMILIES, HIDDEN, SEQ2SEQ_FAMILIES, VOCAB, letter_tokenizer

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class MixedDevices(AssertionError):
    """Not an Exception that the engine turns into a failed row."""


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, copies apart; also the CPU scalars that CUDA would let through.

    What comes back from meta to the host is all ones, so that a step can go on to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_device_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode brings composite operations whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        self.num_device_operations += "meta" in devices
        if func is torch.ops.aten._local_scalar_dense.default and devices == {"meta"}:
            return 1
        if func is torch.ops.aten._to_copy.default and devices == {"meta"} and kwargs.get("device") not in (None, META):
            dtype = kwargs.get("dtype") or tensors[0].dtype
            return torch.ones(tensors[0].shape, dtype=dtype)
        if len(devices) > 1 and func not in COPIES:
            raise MixedDevices(f"{func} mixes {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return func(*args, **kwargs)


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    """Of every kind, on the CPU, where the store loads them."""

    def kv(n: int, num_layers: int, *layers: int) -> Layers:
        made = torch.randn(num_layers, 2, shape.num_kv_heads, n, shape.head_dim)
        return {i: (made[i, 0], made[i, 1]) for i in layers or range(num_layers)}

    if not shape.is_encoder_decoder:
        return {
            "kv": Prefix("kv", kv(5, shape.num_layers)),
            "subset": Prefix("kv", kv(17, shape.num_layers, 1)),
            "soft": Prefix("soft", embeddings=torch.randn(3, HIDDEN)),
            "soft infix": Prefix("soft", embeddings=torch.randn(4, HIDDEN), placement="infix"),
            "kv infix": Prefix("kv", kv(6, shape.num_layers), placement="infix", separator=7),
        }
    parts = {"encoder": kv(5, shape.num_encoder_layers), "cross": kv(4, shape.num_layers, 1)}
    return {
        "kv": Prefix("kv", kv(3, shape.num_layers), **parts, is_seq2seq=True),
        "subset": Prefix("kv", kv(17, shape.num_layers, 0), is_seq2seq=True),
        "soft": Prefix("soft", embeddings=torch.randn(3, HIDDEN), is_seq2seq=True),
    }


def members_of(prefixes: dict[str, Prefix]) -> list[tuple[Composition, ...]]:
    """Of a request a kind, of a composition, an ensemble and the bare model."""
    refs = {name: PrefixRef(name, prefix.layout) for name, prefix in prefixes.items()}
    composed, ensemble = (refs["kv"], refs["subset"]), tuple((ref,) for ref in refs.values())
    return [*(((ref,),) for ref in refs.values()), (composed,), ensemble, ((),)]


EVERY_RULE = LogitRules(
    sequence_bias=(((3,), 1.0), ((1, 4), 2.0)),
    encoder_repetition_penalty=1.2,
    no_repeat_ngram_size=2,
    encoder_no_repeat_ngram_size=2,
    bad_words_ids=((5,), (2,), (3, 4)),
    min_length=40,
    exponential_decay_length_penalty=(0, 1.2),
    suppress_tokens=(7, 8),
    begin_suppress_tokens=(9,),
)


def run_steps(family: str, reads: Reads = "either") -> int:
    """A mixed batch from loads to last tokens, each kind twice; returns how many operations ran on the device."""
    config = (FAMILIES | SEQ2SEQ_FAMILIES)[family]()
    with torch.device(META):
        model = model_class(config).from_config(config, attn_implementation=NAME)
    if config.is_encoder_decoder:
        prepare(model)
    shape = replace(measure_shape(model, "tiny", "none"), reads=reads)
    prefixes = make_prefixes(shape)
    num_blocks, num_prefix_blocks = split_pool(512, 256)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, META))
    engine = WholeSteps(
        runner,
        lambda ref: prefixes[ref.digest],
        num_prefix_blocks=num_prefix_blocks,
        max_rows=16,
        max_step_tokens=24,
        eos_token_ids=frozenset({2}),
    )
    tokenizer = letter_tokenizer()
    params = [
        SamplingParams(max_new_tokens=4),
        SamplingParams(max_new_tokens=3, do_sample=True, top_k=5, top_p=0.9, seed=1, num_top_logprobs=2),
        SamplingParams(max_new_tokens=3, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=3, min_new_tokens=2, rules=EVERY_RULE),
        SamplingParams(max_new_tokens=2, rules=replace(EVERY_RULE, forced_bos_token_id=5, forced_eos_token_ids=(2, 6))),
    ]
    requests = [members for members in members_of(prefixes) for _ in range(2)]
    for i, members in enumerate(requests):
        prompt = [token % VOCAB for token in range(1, 8 + 9 * i % 40)]
        detokenizer = Detokenizer(tokenizer)
        engine.add(Sequence(f"r{i}", prompt, params[i % len(params)], detokenizer, members, runner.decoder_start_ids))
    finished = []
    with OneDevice() as mode:
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
                assert output.token is not None
                if output.token.finish_reason:
                    finished.append(output.sequence.request_id)
    assert sorted(finished) == sorted(f"r{i}" for i in range(len(requests)))
    return mode.num_device_operations


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ_FAMILIES])
@pytest.mark.parametrize("shares", [False, True])
def test_a_step_keeps_to_its_device(family: str, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shares:
        monkeypatch.setattr(batch_module, "MIN_SHARED_TOKENS", 1)
    assert run_steps(family) > 100


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_step_of_two_streams_keeps_to_its_device(family: str) -> None:
    assert run_steps(family, "each") > run_steps(family)


def test_a_planted_order_of_logits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_module.batch_of

    def plant_order(*args: Any, **more: Any) -> Batch:
        batch = made(*args, **more)
        return batch if batch.before is None else plant(batch, "logits_order")

    monkeypatch.setattr(engine_module, "batch_of", plant_order)
    with pytest.raises(MixedDevices, match="cpu"):
        run_steps("llama", "each")


def on_cpu(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return torch.ones(tensor.shape, dtype=tensor.dtype)


OF_BATCH = ("input_ids", "position_ids", "slot_mapping", "logits_index")
OF_ANY_GROUP = ("block_index", "query_index", "out_index", "key_positions")
OF_GROUP = (*OF_ANY_GROUP, "query_positions")  # who is not causal asks for no query's position
OF_SHARED_KEYS = ("token_index", "block_index")


class CpuIndex(BlockIndex):
    def of(self, num_kv_heads: int, num_blocks: int, device: torch.device) -> torch.Tensor:
        return on_cpu(super().of(num_kv_heads, num_blocks, device))


def planted_in_groups(groups: list[AttentionGroup], name: str) -> list[AttentionGroup]:
    if name != "block_index":
        return [replace(group, **{name: on_cpu(getattr(group, name))}) for group in groups]
    planted = [replace(group) for group in groups]
    for group in planted:
        group.block_index = CpuIndex(group.block_tables)
    return planted


def plant(batch: Batch, name: str) -> Batch:
    if name in OF_GROUP:
        return replace(batch, groups=planted_in_groups(batch.groups, name))
    return replace(batch, **{name: on_cpu(getattr(batch, name))})


def check_caught(plant_in: Callable[[Batch], Batch], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_module.batch_of
    monkeypatch.setattr(engine_module, "batch_of", lambda *args, **more: plant_in(made(*args, **more)))
    with pytest.raises(MixedDevices, match="cpu"):
        run_steps(family)


@pytest.mark.parametrize("name", [*OF_BATCH, *OF_GROUP])
def test_a_planted_cpu_tensor_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_caught(lambda batch: plant(batch, name), "llama", monkeypatch)


@pytest.mark.parametrize("name", ["embedding_index", "embeddings"])
def test_planted_embeddings_on_the_cpu_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_caught(lambda b: b if b.embeddings is None else plant(b, name), "llama", monkeypatch)


@pytest.mark.parametrize("name", OF_ANY_GROUP)
def test_a_planted_cpu_tensor_in_cross_attention_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plant_in_cross(batch: Batch) -> Batch:
        return replace(batch, cross_groups=planted_in_groups(batch.cross_groups, name))

    check_caught(plant_in_cross, "t5", monkeypatch)


@pytest.mark.parametrize("name", OF_SHARED_KEYS)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_planted_cpu_tensor_in_shared_keys_is_caught(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plant_in_shared(batch: Batch) -> Batch:
        plant = {"token_index": on_cpu, "block_index": lambda index: CpuIndex(index.block_tables)}[name]
        shared = [replace(keys, **{name: plant(getattr(keys, name))}) for keys in batch.shared_keys]
        return replace(batch, shared_keys=shared)

    monkeypatch.setattr(batch_module, "MIN_SHARED_TOKENS", 1)
    check_caught(plant_in_shared, family, monkeypatch)


@pytest.mark.parametrize("name", OF_GROUP)
@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_a_planted_cpu_tensor_in_groups_that_see_all_is_caught(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers that cannot share."""

    def plant_in_whole(batch: Batch) -> Batch:
        if not batch.shared_keys:
            return batch
        planted = planted_in_groups(batch.whole_groups, name)
        return replace(batch, make_whole_groups=lambda: planted)

    monkeypatch.setattr(batch_module, "MIN_SHARED_TOKENS", 1)
    check_caught(plant_in_whole, family, monkeypatch)


@pytest.mark.parametrize("name", ["input_ids", "slot_mapping", *OF_GROUP])
def test_a_planted_cpu_tensor_in_the_encoder_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_caught(lambda b: replace(b, encoders=[plant(encoder, name) for encoder in b.encoders]), "t5", monkeypatch)


def test_a_prefix_left_on_the_cpu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    written = KVBlocks.write

    def write(self: KVBlocks, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        written(self, layer, slots, *(torch.zeros(tensor.shape) for tensor in (key, value)))

    monkeypatch.setattr(KVBlocks, "write", write)
    with pytest.raises(AssertionError, match="mixes"):
        run_steps("llama")
