"""Every tensor of a step is on the model's device. The device is meta, under a mode that refuses to mix devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from prefix_store.prefix import Prefix
from server.engine import engine as engine_module
from server.engine.attention import NAME
from server.engine.batch import Batch
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, split_pool
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner, measure_shape
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import FAMILIES, HIDDEN, VOCAB, letter_tokenizer

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


def make_prefixes(num_layers: int, num_kv_heads: int, head_dim: int) -> dict[str, Prefix]:
    """On the CPU, where the store loads them."""
    layers = {i: (torch.randn(num_kv_heads, 5, head_dim), torch.randn(num_kv_heads, 5, head_dim)) for i in range(2)}
    return {"kv": Prefix("kv", layers=layers), "soft": Prefix("soft", embeddings=torch.randn(3, HIDDEN))}


def run_steps(family: str) -> int:
    """A mixed batch from loads to last tokens; returns how many operations ran on the device."""
    with torch.device(META):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=NAME)
    shape = measure_shape(model, "tiny", "none")
    prefixes = make_prefixes(shape.num_layers, shape.num_kv_heads, shape.head_dim)
    num_blocks, num_prefix_blocks = split_pool(512, 128)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, META))
    engine = Engine(runner, prefixes.__getitem__, num_prefix_blocks=num_prefix_blocks, max_rows=8, max_step_tokens=16)
    tokenizer = letter_tokenizer()
    params = [
        SamplingParams(max_new_tokens=4),
        SamplingParams(max_new_tokens=3, do_sample=True, top_k=5, top_p=0.9, seed=1, num_top_logprobs=2),
        SamplingParams(max_new_tokens=3, repetition_penalty=1.3),
    ]
    for i, (digest, prefix) in enumerate([*prefixes.items(), (None, None)]):
        members = ((PrefixRef(digest, prefix.layout),),) if digest and prefix else ((),)
        prompt = [token % VOCAB for token in range(1, 8 + 9 * i)]
        engine.add(Sequence(f"r{i}", prompt, params[i], Detokenizer(tokenizer), members))
    finished = []
    with OneDevice() as mode:
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
                assert output.token is not None
                if output.token.finish_reason:
                    finished.append(output.sequence.request_id)
    assert sorted(finished) == ["r0", "r1", "r2"]
    return mode.num_device_operations


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_keeps_to_its_device(family: str) -> None:
    assert run_steps(family) > 100


def on_cpu(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return torch.ones(tensor.shape, dtype=tensor.dtype)


OF_BATCH = ("input_ids", "position_ids", "slot_mapping", "logits_index")
OF_GROUP = ("block_index", "query_index", "out_index", "key_positions")


def plant(batch: Batch, name: str) -> Batch:
    if name in OF_GROUP:
        groups = [replace(group, **{name: on_cpu(getattr(group, name))}) for group in batch.groups]
        return replace(batch, groups=groups)
    return replace(batch, **{name: on_cpu(getattr(batch, name))})


@pytest.mark.parametrize("name", [*OF_BATCH, *OF_GROUP])
def test_a_planted_cpu_tensor_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_module.batch_of
    monkeypatch.setattr(engine_module, "batch_of", lambda *args: plant(made(*args), name))
    with pytest.raises(MixedDevices, match="cpu"):
        run_steps("llama")


def test_a_prefix_left_on_the_cpu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    written = KVBlocks.write

    def write(self: KVBlocks, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        written(self, layer, slots, *(torch.zeros(tensor.shape) for tensor in (key, value)))

    monkeypatch.setattr(KVBlocks, "write", write)
    with pytest.raises(AssertionError, match="mixes"):
        run_steps("llama")
