"""Small modules of the model in one pass each, where a kernel gives what the module itself gives.

No list of families decides: a module whose shape fits is asked for its answer to a random input and replaced only if
the kernel's is the same. What differs keeps its own code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from server.engine.cpu_kernels import DTYPES, CpuKernels
from server.engine.linear import FusedLinear, FusedProducts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
NUM_PROBED_TOKENS = 5
SCALES = (1e-5, 1e-3, 1.0, 30.0)  # of probes: an epsilon shows in small inputs only, what a gate does in large ones
ROTATE = "apply_rotary_pos_emb"  # what transformers calls it, in the families that have it
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class FusedNorm(torch.nn.Module):
    """In place of an RMSNorm. Where the stream has another dtype than the weight, its own code runs."""

    def __init__(
        self, kernels: CpuKernels, own: torch.nn.Module, weight: torch.Tensor, epsilon: float, *, plus_one: bool
    ) -> None:
        super().__init__()
        self._kernels, self.weight = kernels, weight
        self._epsilon, self._plus_one = epsilon, plus_one
        self._own_forward = own.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not self.weight.dtype:
            found: torch.Tensor = self._own_forward(x)
            return found
        return self._kernels.rms_norm(x, self.weight, self._epsilon, plus_one=self._plus_one)

    __call__ = forward


class FusedGate(torch.nn.Module):
    """In place of `down(silu(gate(x)) * up(x))`, gate and up being one product."""

    def __init__(self, kernels: CpuKernels, gate_up: FusedProducts, down: torch.nn.Module) -> None:
        super().__init__()
        self._kernels, self._gate_up = kernels, gate_up
        self.down_proj = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(self._kernels.silu_mul(self._gate_up.whole(x)))
        return found

    __call__ = forward


@torch.inference_mode()
def fuse_modules(model: Any, kernels: CpuKernels) -> int:
    """Replace what can be; how many modules."""
    if model.device.type != "cpu" or model.dtype not in DTYPES:
        return 0
    num_fused = 0
    for parent in list(model.modules()):
        for name, own in list(parent.named_children()):
            fused = _norm(own, kernels) or _gate(own, kernels)
            if fused is not None:
                parent._modules[name] = fused
                num_fused += 1
        num_fused += _turn(parent, kernels, model.dtype)
    return num_fused


def _norm(own: Any, kernels: CpuKernels) -> torch.nn.Module | None:
    epsilon = getattr(own, "variance_epsilon", getattr(own, "eps", None))
    if list(own._parameters) != ["weight"] or own.weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    weight: torch.Tensor = own.weight
    candidates = (FusedNorm(kernels, own, weight, epsilon, plus_one=plus_one) for plus_one in (False, True))
    return next((fused for fused in candidates if _is_same(fused, own, len(weight), weight.dtype)), None)


def _gate(own: Any, kernels: CpuKernels) -> torch.nn.Module | None:
    gate, up = getattr(own, "gate_proj", None), getattr(own, "up_proj", None)
    if not (isinstance(gate, FusedLinear) and isinstance(up, FusedLinear) and hasattr(own, "down_proj")):
        return None
    fused = FusedGate(kernels, gate.products, own.down_proj)
    return fused if _is_same(fused, own, gate.in_features, gate.weight.dtype) else None


def _turn(attention: Any, kernels: CpuKernels, dtype: torch.dtype) -> bool:
    """Let this attention's own code call the kernel where it turns queries and keys by their position."""
    forward = getattr(type(attention), "forward", None)
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(ROTATE)
    if hasattr(forward, "__wrapped__") or own is None:
        return False
    rotate = _rotate(own, kernels)
    query, key = (_probe(2, NUM_PROBED_TOKENS, 8, dtype=dtype)[None] for _ in range(2))
    cosine, sine = (_probe(NUM_PROBED_TOKENS, 8, dtype=dtype)[None] for _ in range(2))
    try:
        expected = own(query, key, cosine, sine)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    found = rotate(query.clone(), key.clone(), cosine, sine)
    if not all(_is_near(one, other) for one, other in zip(found, expected, strict=True)):
        return False
    names = {**forward.__globals__, ROTATE: rotate}
    turned = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    turned.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = MethodType(turned, attention)
    return True


def _rotate(own: Rotate, kernels: CpuKernels) -> Rotate:
    def rotate(
        query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = (
            not args
            and not kwargs
            and query.shape[0] == 1
            and query.shape[-1] == cosine.shape[-1] == sine.shape[-1]
            and query.stride(-1) == key.stride(-1) == 1
            and query.dtype == cosine.dtype
            and cosine.is_contiguous()
            and sine.is_contiguous()
        )
        if not fits:
            return own(query, key, cosine, sine, *args, **kwargs)
        return kernels.rotate(query, cosine, sine), kernels.rotate(key, cosine, sine)

    return rotate


def _is_same(fused: torch.nn.Module, own: torch.nn.Module, dim: int, dtype: torch.dtype) -> bool:
    for scale in SCALES:
        x = _probe(1, NUM_PROBED_TOKENS, dim, dtype=dtype) * scale
        try:
            expected = own(x)
        except (TypeError, RuntimeError):  # it takes more than one tensor, or another one
            return False
        if not (isinstance(expected, torch.Tensor) and _is_near(fused(x), expected)):
            return False
    return True


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    limit = TOLERANCE[found.dtype] * float(expected.abs().max())
    return bool((found.float() - expected.float()).abs().max() <= limit)


def _probe(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
