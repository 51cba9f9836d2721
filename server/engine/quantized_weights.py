"""Weights in 8 bits, a scale an output, and inputs in 8 bits, a scale a row, made as they come (`--quantize int8`).

A scale a row, not one for all: a row's result must not depend on what runs beside it. Sums of products of whole
numbers are exact, so it is bitwise the same. The product is a private operator of one torch version.
"""

from __future__ import annotations

from typing import Any

import torch

from server.engine.cpu_kernels import DTYPES, CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.linear import replace_linears

TOLERANCE = 0.01  # of the largest result: it is rounded to bf16 twice
FEW_ROWS = 4  # up to which the operator costs more than it multiplies; the weights are kept twice for that
ZERO = 128  # inputs are unsigned: with signed ones the operator falls back to a reference 500 times slower


class QuantizedWeight:
    """`[out, in]` with its bias. Calls give `[..., out]` in the input's dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: CpuKernels) -> None:
        self.out_features, self.in_features = weight.shape
        self._kernels = kernels
        self._bias = bias
        self._scales = weight.abs().amax(1).float().clamp_(min=1e-12) / 127
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._values = self._rounded(weight)
        self._sums = ZERO * self._values.sum(1, dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(self._values, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self.out_features))
        rows = x.reshape(-1, self.in_features).contiguous()
        values, scales = self._kernels.quantize(rows)
        if len(rows) <= FEW_ROWS:
            product = self._kernels.few_rows(values, self._values, self._sums, self._scales, x.dtype)
        else:
            product = self.product(values, x.dtype)
        return self._kernels.scale_rows(product, scales, self._bias).view(*x.shape[:-1], -1)

    def product(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of many rows that are 8-bit already `[rows, in]`, their scales not yet applied."""
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            *(values, 1.0, ZERO, self._packed, self._scales, self._zeros, None, 1.0, 0, dtype, "none", [], "")
        )
        return found

    def is_right(self, weight: torch.Tensor) -> bool:
        """Near the plain product of the rounded numbers. A processor whose sums of products saturate shows it where
        all inputs are as large as they can be."""
        x = torch.sign(weight[:1].float()) * torch.linspace(1, 0.5, 5)[:, None]
        x = x.to(weight.dtype)
        values, scales = self._kernels.quantize(x)
        rounded = (values.float() - ZERO) * scales[:, None]
        bias = None if self._bias is None else self._bias.float()
        expected = torch.nn.functional.linear(rounded, self._rounded(weight) * self._scales[:, None], bias)
        found = self(x)
        is_near = bool((found.float() - expected).abs().max() <= TOLERANCE * expected.abs().max())
        return is_near and torch.equal(self(x[:FEW_ROWS]), found[:FEW_ROWS])

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() / self._scales[:, None]).round_().to(torch.int8)


def quantize_weights(model: Any, kernels: CpuKernels | None) -> int:
    """Quantise all linear modules of the model; how many. Raises ModelRefusedError where that cannot be done well."""
    if model.device.type != "cpu" or model.dtype not in DTYPES or kernels is None:
        raise ModelRefusedError(
            f"int8 needs a CPU, a C compiler and float32 or bfloat16, got {model.device.type}, "
            f"{'no kernels' if kernels is None else 'kernels'} and {model.dtype}"
        )
    checked: set[tuple[int, ...]] = set()

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedWeight:
        made = QuantizedWeight(weight, bias, kernels)
        if tuple(weight.shape) not in checked and not made.is_right(weight):
            raise ModelRefusedError(f"int8 products of {tuple(weight.shape)} weights are not right on this processor")
        checked.add(tuple(weight.shape))
        return made

    return replace_linears(model, make)
