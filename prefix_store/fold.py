"""An unfolded training checkpoint (P_theta and its MLP) to the KV prefix that it stands for (Li and Liang, 2021)."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.safetensors_header import max_header_bytes, read_header
from prefix_store.validation import validate

# (P_theta, MLP): PEFT's names, then Li and Liang's
NAMES = (("embedding.weight", "transform"), ("wte.weight", "control_trans"))


def fold_file(path: Path, shape: ModelShape) -> Prefix:
    """`.safetensors`, or a torch file, which is read with `weights_only`. Raises InvalidArtefactError."""
    if path.suffix == ".safetensors":
        body = path.read_bytes()
        read_header(body, max_header_bytes(shape.num_layers))
        return fold(safetensors.torch.load(body), shape)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not one of weights alone
        raise InvalidArtefactError(f"{path.name} is not a file of weights alone: {str(error)[:200]}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise InvalidArtefactError(f"{path.name} must hold named tensors, got {type(found).__name__}")
    return fold({str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}, shape)


@torch.inference_mode()
def fold(tensors: dict[str, torch.Tensor], shape: ModelShape) -> Prefix:
    """`Linear(k, m)`, `Tanh`, `Linear(m, 2 * layers * kv_heads * head_dim)` over the rows of P_theta `[n, k]`."""
    for table_name, mlp in NAMES:
        wanted = (table_name, f"{mlp}.0.weight", f"{mlp}.0.bias", f"{mlp}.2.weight", f"{mlp}.2.bias")
        found = [_ending(tensors, name) for name in wanted]
        if all(tensor is not None for tensor in found):
            break
    else:
        raise InvalidArtefactError(
            f"expected embedding.weight with transform.0/2.* (PEFT) or wte.weight with control_trans.0/2.* "
            f"(Li and Liang), got {', '.join(sorted(tensors)[:8])}"
        )
    table, w0, b0, w2, b2 = (tensor.float() for tensor in found if tensor is not None)
    width = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    sizes = [tuple(t.shape) for t in (table, w0, b0, w2, b2)]
    if [t.dim() for t in (table, w0, b0, w2, b2)] != [2, 2, 1, 2, 1] or (
        w0.shape != (w2.shape[1], table.shape[1]) or b0.shape[0] != w0.shape[0] or w2.shape[0] != b2.shape[0]
    ):
        raise InvalidArtefactError(f"P_theta [n, k] and its MLP (k to m to width) do not fit each other: {sizes}")
    if w2.shape[0] != width:
        raise InvalidArtefactError(
            f"{mlp}.2.weight: width must be {width} (2 * {shape.num_layers} layers * {shape.num_kv_heads} KV heads * "
            f"{shape.head_dim}), got {w2.shape[0]}"
        )
    folded = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(table, w0, b0)), w2, b2)
    slots = folded.view(-1, 2 * shape.num_layers, shape.num_kv_heads, shape.head_dim).permute(1, 2, 0, 3).contiguous()
    prefix = Prefix("kv", layers={i: (slots[2 * i], slots[2 * i + 1]) for i in range(shape.num_layers)})
    validate(prefix, shape)
    return prefix


def _ending(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of that name, whatever module it sits in."""
    found = [tensor for key, tensor in tensors.items() if key == name or key.endswith("." + name)]
    return found[0] if len(found) == 1 else None
