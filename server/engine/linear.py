"""The model's linear modules on a CPU: their weights laid out for its products, products of one input done as one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.pytorch_utils import Conv1D

# Modules of one parent that take the same input: their products are one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))


class Weight(Protocol):
    """A matrix and its bias: calls give `[..., out_features]` of `[..., in_features]`."""

    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


# What is made of a weight `[out, in]` and its bias; None where it would not be right.
Make = Callable[[torch.Tensor, torch.Tensor | None], Weight | None]


class FastLinear(torch.nn.Module):
    """In place of a Linear (or GPT-2's Conv1D)."""

    def __init__(self, weight: Weight, own: Any) -> None:
        super().__init__()
        self.product = weight
        self.weight = torch.empty(0, dtype=own.weight.dtype)  # families ask for its dtype
        self.in_features, self.out_features = weight.in_features, weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)

    __call__ = forward  # a step has hundreds of calls: those of modules without hooks need not look for any


class FusedProducts:
    """The products of several modules that take one input, done when the first of them is called with it."""

    def __init__(self, weight: Weight, sizes: list[int]) -> None:
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
def replace_linears(model: Any, make: Make) -> int:
    """Replace the model's linear modules by what `make` gives, where it gives something; how many. The weights are
    dropped from where they were, those apart that an embedding shares."""
    num_replaced = 0
    for parent in list(model.modules()):
        children = {name: own for name, own in parent.named_children() if type(own) in (torch.nn.Linear, Conv1D)}
        is_cross = model.config.is_encoder_decoder and "q_proj" in children  # keys may be another input's
        for names in FUSED[1:] if is_cross else FUSED:
            if all(type(children.get(name)) is torch.nn.Linear for name in names):
                num_replaced += _fuse(parent, {name: children.pop(name) for name in names}, make)
        for name, own in children.items():
            made = make(own.weight.T if isinstance(own, Conv1D) else own.weight, own.bias)
            if made is not None:
                parent._modules[name] = FastLinear(made, own)
                num_replaced += 1
    return num_replaced


def _fuse(parent: Any, owns: dict[str, Any], make: Make) -> int:
    weights = [own.weight for own in owns.values()]
    sizes = [len(weight) for weight in weights]
    biases = [own.bias for own in owns.values()]
    bias = None
    if any(found is not None for found in biases):
        zeros = [torch.zeros(size, dtype=weights[0].dtype) for size in sizes]
        bias = torch.cat([zero if found is None else found for zero, found in zip(zeros, biases, strict=True)])
    made = make(torch.cat(weights), bias)
    if made is None:
        return 0
    products = FusedProducts(made, sizes)
    for index, (name, own) in enumerate(owns.items()):
        parent._modules[name] = FusedLinear(products, index, own)
    return len(owns)
