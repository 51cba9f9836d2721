"""Which small modules the kernels take over: those whose answers they give, of that model, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from server.engine.cpu_kernels import CpuKernels
from server.engine.fused_modules import ROTATE, FusedGate, FusedNorm, fuse_modules
from server.engine.reordered_weights import can_reorder, reorder_weights
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, seq2seq_model

DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.arange(3, 23)[None]


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms that weigh every feature differently."""
    torch.manual_seed(0)
    if family in SEQ2SEQ_FAMILIES:
        model = seq2seq_model(SEQ2SEQ_FAMILIES[family]())
    else:
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=ids, use_cache=False, **more).logits.float()
    return found


def fused(model: Any, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


def turned(model: Any) -> list[torch.nn.Module]:
    """Attentions that call the kernel to turn queries and keys."""
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "num_norms", "num_gates", "num_turned"),
    [
        ("llama", 2 * 2 + 1, 2, 2),
        ("qwen3", 2 * 4 + 1, 2, 2),  # two more of queries and keys
        ("gemma3", 3 * 6 + 1, 0, 3),  # a GELU gates
        ("gpt_neox", 0, 0, 2),
        ("gpt2", 0, 0, 0),
        ("opt", 0, 0, 0),
        ("t5", 3 * 2 + 1 + 3 * 3 + 1, 0, 0),
        ("mt5", 2 * 2 + 1 + 2 * 3 + 1, 0, 0),
        ("bart", 0, 0, 0),
    ],
)
def test_of_each_family_is_fused_what_fits(
    family: str, num_norms: int, num_gates: int, num_turned: int, dtype: torch.dtype, kernels: CpuKernels
) -> None:
    model = tiny(family, dtype)
    reorder_weights(model)
    num_gates = num_gates if can_reorder(dtype) else 0
    assert fuse_modules(model, kernels) == num_norms + num_gates + num_turned
    norms = fused(model, FusedNorm)
    assert (len(norms), len(fused(model, FusedGate)), len(turned(model))) == (num_norms, num_gates, num_turned)
    assert {norm._plus_one for norm in norms} <= {family == "gemma3"}


def test_gates_stay_where_their_products_are_not_one(kernels: CpuKernels) -> None:
    model = tiny("llama")
    fuse_modules(model, kernels)
    assert not fused(model, FusedGate)
    assert len(fused(model, FusedNorm)) == 5


@pytest.mark.parametrize("reorders", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ_FAMILIES])
def test_a_fused_model_answers_as_before(family: str, reorders: bool, kernels: CpuKernels) -> None:
    model = tiny(family)
    before, of_two = logits(model), logits(model, torch.stack((IDS[0], IDS[0].flip(0))))
    if reorders:
        reorder_weights(model)
    fuse_modules(model, kernels)
    limit = 1e-5 * float(before.abs().max())
    assert float((logits(model) - before).abs().max()) < limit
    # A batch of two is no packed stream: what the kernel does not take, the model's own function does.
    assert float((logits(model, torch.stack((IDS[0], IDS[0].flip(0)))) - of_two).abs().max()) < limit


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "t5"])
def test_a_fused_model_in_bf16_is_as_near_to_fp32_as_its_own_modules(family: str, kernels: CpuKernels) -> None:
    model = tiny(family, torch.bfloat16)
    exact = logits(copy.deepcopy(model).float())
    before = float((logits(model) - exact).pow(2).mean())
    assert fuse_modules(model, kernels)
    assert float((logits(model) - exact).pow(2).mean()) < 1.5 * before


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_fused_norm_gives_what_the_own_one_gives(
    family: str, dtype: torch.dtype, scale: float, kernels: CpuKernels
) -> None:
    own_model, model = tiny(family, dtype), tiny(family, dtype)
    fuse_modules(model, kernels)
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, FusedNorm):
            x = (torch.randn(1, 9, len(module.weight)) * scale).to(dtype)
            expected = own_model.get_submodule(name)(x)
            tolerance = 2e-6 if dtype is torch.float32 else 2.0**-7
            torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance * 1e-3)
            compared += 1
    assert compared >= 5


class OtherEpsilon(LlamaRMSNorm):
    """Says 1e-6 and adds more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class EpsilonOutside(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Centred(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Clipped(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-20, 20))


class OfTwo(LlamaRMSNorm):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().forward(x + residual)


class Pair(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Wider(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


class Grouped(LlamaRMSNorm):
    """Of halves of the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.unflatten(-1, (2, -1))
        scale = torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (halves * scale).flatten(-2)


@pytest.mark.parametrize("kind", [OtherEpsilon, EpsilonOutside, Centred, Clipped, OfTwo, Pair, Wider, Grouped])
def test_a_norm_of_another_make_stays(kind: type[LlamaRMSNorm], kernels: CpuKernels) -> None:
    model = tiny("llama")
    model.model.norm = kind(64, 1e-6)
    fuse_modules(model, kernels)
    assert type(model.model.norm) is kind
    assert len(fused(model, FusedNorm)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.ones(64, 1)},
        {"variance_epsilon": None},
        {"variance_epsilon": torch.tensor(1e-6)},
        {"bias": torch.nn.Parameter(torch.ones(64))},
    ],
)
def test_a_norm_with_other_fields_stays(change: dict[str, Any], kernels: CpuKernels) -> None:
    model = tiny("llama")
    norm = model.model.norm
    for name, value in change.items():
        setattr(norm, name, torch.nn.Parameter(value) if name == "weight" else value)
    fuse_modules(model, kernels)
    assert model.model.norm is norm


def test_a_norm_in_another_dtype_than_its_stream_computes_as_before(kernels: CpuKernels) -> None:
    model = tiny("llama", torch.bfloat16)
    own = model.model.norm.float()
    x = torch.randn(1, 5, 64).bfloat16()
    expected = own(x)
    fuse_modules(model, kernels)
    assert torch.equal(model.model.norm(x), expected)
    assert torch.equal(model.model.norm(x.float()), kernels.rms_norm(x.float(), own.weight, 1e-6, plus_one=False))


def swapped(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = mlp.down_proj(torch.nn.functional.silu(mlp.up_proj(x)) * mlp.gate_proj(x))
    return found


def clipped(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gate = mlp.gate_proj(x).clamp(max=7)
    found: torch.Tensor = mlp.down_proj(torch.nn.functional.silu(gate) * mlp.up_proj(x))
    return found


def shifted(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * (mlp.up_proj(x) + 1e-3))
    return found


@pytest.mark.parametrize("weight_scale", [0.05, 1.0])
@pytest.mark.parametrize("other", ["gelu", "gelu_pytorch_tanh", "relu", "sigmoid", swapped, clipped, shifted])
def test_a_gate_of_another_make_stays(
    other: str | Callable[[Any, torch.Tensor], torch.Tensor], weight_scale: float, kernels: CpuKernels
) -> None:
    """Also where weights are small: near 0 all gates are nearly alike."""
    config = FAMILIES["llama"]()
    if isinstance(other, str):
        config.hidden_act = other
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    first, second = (layer.mlp for layer in model.model.layers)
    for mlp in (first, second):
        mlp.gate_proj.weight *= weight_scale
    if callable(other):
        kind = type("Other", (type(first),), {"forward": other})
        first.__class__ = kind
    reorder_weights(model)
    fuse_modules(model, kernels)
    assert model.model.layers[0].mlp is first
    assert (model.model.layers[1].mlp is second) == isinstance(other, str)


def interleaved(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        half = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + half * sin[:, None]

    return turn(q), turn(k)


def of_first_half(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The angles of one half count for both."""
    cos, sin = (x[..., : x.shape[-1] // 2].repeat(1, 1, 2) for x in (cos, sin))
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def queries_only(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0], k


def backwards(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin)


def with_positions(q: Any, k: Any, cos: Any, sin: Any, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError


def widening(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    return q.double(), k.double()


@pytest.mark.parametrize("other", [interleaved, of_first_half, queries_only, backwards, with_positions, widening])
def test_a_rotation_of_another_make_stays(other: Callable[..., Any], kernels: CpuKernels) -> None:
    own = LlamaAttention.forward
    forward = FunctionType(own.__code__, {**own.__globals__, ROTATE: other}, own.__name__, own.__defaults__)
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("Other", (LlamaAttention,), {"forward": forward})
    fuse_modules(model, kernels)
    assert turned(model) == [model.model.layers[1].self_attn]


def test_other_models_and_transformers_itself_stay_as_they_are(kernels: CpuKernels) -> None:
    other = tiny("llama")
    before = logits(other)
    rotate, forward = modeling_llama.apply_rotary_pos_emb, LlamaAttention.forward
    fuse_modules(tiny("llama"), kernels)
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert LlamaAttention.forward is forward
    assert forward.__globals__[ROTATE] is rotate
    assert not turned(other)
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_in_other_dtypes_stay_as_they_are(dtype: torch.dtype, kernels: CpuKernels) -> None:
    model = tiny("llama", dtype)
    assert fuse_modules(model, kernels) == 0
    assert not turned(model)
    assert not fused(model, FusedNorm)


def test_models_on_other_devices_stay_as_they_are(kernels: CpuKernels) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    assert fuse_modules(model, kernels) == 0
    assert not turned(model)
