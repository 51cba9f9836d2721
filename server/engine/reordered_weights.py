"""Weights reordered once for oneDNN, by private operators of one torch version that only this file knows.

It asks at start whether they give right results, and the same ones for a row however many run beside it; where not,
the model keeps its own modules.
"""

from __future__ import annotations

from typing import Any

import torch

from server.engine.linear import replace_linears

PROBED_ROWS = (1, 2, 3, 5, 8, 13, 32, 64, 100, 256)
PACKED_FOR_ROWS = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


class ReorderedWeight:
    """`[out, in]` with its bias, laid out for oneDNN. Calls give `[..., out]`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self._bias = bias
        self.pads_single_rows = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.pads_single_rows and x.numel() == self.in_features:
            rows = x.reshape(1, -1).expand(2, -1).contiguous()
            return self._product(rows)[:1].reshape(*x.shape[:-1], -1)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")
        return found

    def is_right(self, weight: torch.Tensor) -> bool:
        """Near the plain product, and every row bitwise the same among 1 to 256. A single row takes another path in
        some shapes: it then runs as two."""
        x = torch.randn(max(PROBED_ROWS), self.in_features, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        expected = torch.nn.functional.linear(x, weight, self._bias).float()
        every = self._product(x)
        if not bool((every.float() - expected).abs().max() <= TOLERANCE[weight.dtype] * expected.abs().max()):
            return False
        self.pads_single_rows = not torch.equal(self._product(x[:1]), every[:1])
        return all(torch.equal(self(x[:n]), every[:n]) for n in PROBED_ROWS[:-1])


def can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies it on this processor: 16-bit floats need AVX512 or their own instructions."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype in TOLERANCE


def reorder_weights(model: Any) -> int:
    """Reorder the weights of the model's linear modules where that is possible and right; how many."""
    if model.device.type != "cpu" or not can_reorder(model.dtype):
        return 0
    pads_single_rows: dict[tuple[Any, ...], bool | None] = {}  # of each shape, asked once; None: not right

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> ReorderedWeight | None:
        made = ReorderedWeight(weight, bias)
        key = (*weight.shape, weight.dtype, bias is None)
        if key not in pads_single_rows:
            pads_single_rows[key] = made.pads_single_rows if made.is_right(weight) else None
        pads = pads_single_rows[key]
        if pads is None:
            return None
        made.pads_single_rows = pads
        return made

    return replace_linears(model, make)
