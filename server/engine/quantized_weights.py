"""Weights in 8 bits, a scale an output, and inputs in 8 bits, a scale a row, made as they come (`--quantize int8`).

A scale a row, not one for all: a row's result must not depend on what runs beside it. Sums of products of whole
numbers are exact, so it is bitwise the same. oneDNN's product is a private operator of one torch version, and exact on
processors with VNNI only; on others the product is a kernel of our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from server.engine.cpu_kernels import DTYPES, PANEL, CpuKernels, in_panels
from server.engine.errors import ModelRefusedError
from server.engine.linear import replace_linears

TOLERANCE = 0.01  # of the largest result: it is rounded to bf16 twice
FEW_ROWS = 4  # up to which the operator costs more than it multiplies; the weights are kept twice for that
ZERO = 128  # inputs are unsigned: with signed ones the operator falls back to a reference 500 times slower
SATURATING = 64  # inputs and outputs of a weight whose every pair of products exceeds 16 bits


class QuantizedWeight(ABC):
    """`[out, in]` with its bias. Calls give `[..., out]` in the input's dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: CpuKernels) -> None:
        self.out_features, self.in_features = weight.shape
        self._kernels = kernels
        self._bias = bias
        self._scales = weight.abs().amax(1).float().clamp_(min=1e-12) / 127

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self.out_features))
        rows = x.reshape(-1, self.in_features).contiguous()
        return self.product(*self.quantized(rows), x.dtype).view(*x.shape[:-1], -1)

    @abstractmethod
    def quantized(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, in]` as whole numbers and a scale a row."""

    @abstractmethod
    def product(self, values: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, out]` of rows that are 8-bit already."""

    def is_right(self, weight: torch.Tensor) -> bool:
        """Near the plain product of the rounded numbers, and the same for few rows as among many."""
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


class OneDnnWeight(QuantizedWeight):
    """Multiplied by oneDNN; few rows by a loop of our own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: CpuKernels) -> None:
        super().__init__(weight, bias, kernels)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._values = self._rounded(weight)
        self._sums = ZERO * self._values.sum(1, dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(self._values, None)

    def quantized(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.quantize(rows)

    def product(self, values: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if len(values) <= FEW_ROWS:
            product = self._kernels.few_rows(values, self._values, self._sums, self._scales, dtype)
        else:
            product = torch.ops.onednn.qlinear_pointwise.default(
                *(values, 1.0, ZERO, self._packed, self._scales, self._zeros, None, 1.0, 0, dtype, "none", [], "")
            )
        return self._kernels.scale_rows(product, row_scales, self._bias)


class PanelWeight(QuantizedWeight):
    """Multiplied by our own kernel, any number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: CpuKernels) -> None:
        super().__init__(weight, bias, kernels)
        self._panels = in_panels(self._rounded(weight))
        padding = (0, -self.out_features % PANEL)
        added = torch.zeros(self.out_features) if bias is None else bias.float()
        self._padded_scales, self._added = (torch.nn.functional.pad(x, padding) for x in (self._scales, added))

    def quantized(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.quantize_wide(rows)

    def product(self, values: torch.Tensor, row_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._kernels.multiply_int8(
            values, row_scales, self._panels, self._padded_scales, self._added, self.out_features, dtype
        )


def fastest_kind(kernels: CpuKernels) -> type[QuantizedWeight]:
    """oneDNN's where its products do not saturate. In fp32: without VNNI those to bf16 are right, but slow."""
    weight = torch.ones(SATURATING, SATURATING)
    return OneDnnWeight if OneDnnWeight(weight, None, kernels).is_right(weight) else PanelWeight


def quantize_weights(model: Any, kernels: CpuKernels | None) -> int:
    """Quantise all linear modules of the model; how many. Raises ModelRefusedError where that cannot be done well."""
    if model.device.type != "cpu" or model.dtype not in DTYPES or kernels is None:
        raise ModelRefusedError(
            f"int8 needs a CPU, a C compiler and float32 or bfloat16, got {model.device.type}, "
            f"{'no kernels' if kernels is None else 'kernels'} and {model.dtype}"
        )
    kind = fastest_kind(kernels)
    checked: set[tuple[int, ...]] = set()

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedWeight:
        made = kind(weight, bias, kernels)
        if tuple(weight.shape) not in checked and not made.is_right(weight):
            raise ModelRefusedError(f"int8 products of {tuple(weight.shape)} weights are not right on this processor")
        checked.add(tuple(weight.shape))
        return made

    return replace_linears(model, make)
