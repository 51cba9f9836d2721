"""The model's matrix products on a CPU: weights reordered once for oneDNN, and products of one input done as one.

Private operators of one torch version do it; this file is the only place that knows them. It asks at start whether they
give right results, and the same ones for a row however many run beside it; where not, the model keeps its own modules.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

# Modules of one parent that take the same input: their products are one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))
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
        return all(torch.equal(self(x[:n]), every[:n]) for n in PROBED_ROWS)


class ReorderedLinear(torch.nn.Module):
    """In place of a Linear (or GPT-2's Conv1D)."""

    def __init__(self, weight: ReorderedWeight, own: Any) -> None:
        super().__init__()
        self._reordered = weight
        self.weight = torch.empty(0, dtype=own.weight.dtype)  # families ask for its dtype
        self.in_features, self.out_features = weight.in_features, weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._reordered(x)

    __call__ = forward  # a step has hundreds of calls: those of modules without hooks need not look for any


class FusedProducts:
    """The products of several modules that take one input, done when the first of them is called with it."""

    def __init__(self, weight: ReorderedWeight, sizes: list[int]) -> None:
        self._weight = weight
        self._sizes = sizes
        self._done = threading.local()  # a trial forward may run in another thread

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """All products side by side `[..., sum of outs]`."""
        return self._weight(x)

    def __call__(self, x: torch.Tensor, index: int) -> torch.Tensor:
        done = self._done.__dict__
        if index == 0 or done.get("x") is not x:
            done["x"], done["parts"] = x, self._weight(x).split_with_sizes(self._sizes, -1)
        part: torch.Tensor = done["parts"][index]
        if index == len(self._sizes) - 1:
            done.clear()
        return part


class FusedLinear(torch.nn.Module):
    """One of the modules whose products are done together."""

    def __init__(self, products: FusedProducts, index: int, own: Any) -> None:
        super().__init__()
        self.products, self._index = products, index
        self.weight = torch.empty(0, dtype=own.weight.dtype)
        self.in_features, self.out_features = own.in_features, own.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products(x, self._index)

    __call__ = forward


@torch.inference_mode()
def reorder_weights(model: Any) -> int:
    """Replace the model's linear modules where that is possible and right; how many. The weights are dropped from
    where they were, those apart that an embedding shares."""
    if model.device.type != "cpu" or model.dtype not in TOLERANCE:
        return 0
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    reorder = _Reorder()
    for parent in list(model.modules()):
        children = {name: own for name, own in parent.named_children() if type(own) in (torch.nn.Linear, Conv1D)}
        is_cross = model.config.is_encoder_decoder and "q_proj" in children  # keys may be another input's
        for names in FUSED[1:] if is_cross else FUSED:
            if all(type(children.get(name)) is torch.nn.Linear for name in names):
                reorder.fuse(parent, {name: children.pop(name) for name in names})
        for name, own in children.items():
            reorder.replace(parent, name, own)
    return reorder.num_replaced


class _Reorder:
    """What was found of each shape is found once."""

    def __init__(self) -> None:
        self.num_replaced = 0
        self._pads_single_rows: dict[tuple[Any, ...], bool | None] = {}  # None: not right

    def replace(self, parent: Any, name: str, own: Any) -> None:
        made = self._reordered(own.weight.T if isinstance(own, Conv1D) else own.weight, own.bias)
        if made is not None:
            parent._modules[name] = ReorderedLinear(made, own)
            self.num_replaced += 1

    def fuse(self, parent: Any, owns: dict[str, Any]) -> None:
        weights = [own.weight for own in owns.values()]
        sizes = [len(weight) for weight in weights]
        biases = [own.bias for own in owns.values()]
        bias = None
        if any(found is not None for found in biases):
            zeros = [torch.zeros(size, dtype=weights[0].dtype) for size in sizes]
            bias = torch.cat([zero if found is None else found for zero, found in zip(zeros, biases, strict=True)])
        made = self._reordered(torch.cat(weights), bias)
        if made is not None:
            products = FusedProducts(made, sizes)
            for index, (name, own) in enumerate(owns.items()):
                parent._modules[name] = FusedLinear(products, index, own)
            self.num_replaced += len(owns)

    def _reordered(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ReorderedWeight | None:
        made = ReorderedWeight(weight, bias)
        key = (*weight.shape, weight.dtype, bias is None)
        if key not in self._pads_single_rows:
            self._pads_single_rows[key] = made.pads_single_rows if made.is_right(weight) else None
        pads = self._pads_single_rows[key]
        if pads is None:
            return None
        made.pads_single_rows = pads
        return made
