"""The native file, `prefixserve/1`: one canonical safetensors file an artefact; its sha256 is the digest."""

from __future__ import annotations

import hashlib
import json
import re

import safetensors.torch
import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.safetensors_header import Header, max_header_bytes, read_header
from prefix_store.validation import validate

FORMAT = "prefixserve/1"
LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(key|value)")
METADATA_KEYS = {"format", "kind", "placement", "separator", "base_model", "fingerprint"}
MAX_TEXT = 500
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def read_native(body: bytes, shape: ModelShape) -> Prefix:
    """A validated prefix. Raises InvalidArtefactError."""
    header = read_header(body, max_header_bytes(shape.num_layers))
    metadata = _checked_metadata(header)
    kind = metadata["kind"]
    names = set(header.tensors)
    base_model, fingerprint = metadata.get("base_model"), metadata.get("fingerprint")
    if kind == "soft":
        if names != {"embeddings"}:
            raise InvalidArtefactError(f"a soft prompt has one tensor, embeddings; got {_some(names)}")
        _check_sizes_before_load(header, shape)
        embeddings = safetensors.torch.load(body)["embeddings"]
        prefix = Prefix("soft", embeddings=embeddings, base_model=base_model, fingerprint=fingerprint)
    else:
        wrong = {name for name in names if not LAYER_NAME.fullmatch(name)}
        if wrong:
            raise InvalidArtefactError(
                f"a KV prefix has layers.N.key and layers.N.value only (N from 0 to {shape.num_layers - 1}); "
                f"got {_some(wrong)}"
            )
        layers = sorted({int(name.split(".")[1]) for name in names})
        for layer in layers:
            for part in ("key", "value"):
                if f"layers.{layer}.{part}" not in names:
                    raise InvalidArtefactError(f"layers.{layer}.{part} is missing")
        _check_sizes_before_load(header, shape)
        tensors = safetensors.torch.load(body)
        pairs = {i: (tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"]) for i in layers}
        prefix = Prefix("kv", layers=pairs, base_model=base_model, fingerprint=fingerprint)
    validate(prefix, shape)
    return prefix


def write_native(prefix: Prefix) -> bytes:
    """The canonical file: keys sorted, tensors in the order of their names, no choice left to the writer."""
    metadata = {"format": FORMAT, "kind": prefix.kind, "placement": prefix.placement}
    for key, text in (("base_model", prefix.base_model), ("fingerprint", prefix.fingerprint)):
        if text is not None:
            metadata[key] = text
    if prefix.separator is not None:
        metadata["separator"] = str(prefix.separator)
    tensors = {} if prefix.embeddings is None else {"embeddings": prefix.embeddings}
    for layer, (key_tensor, value_tensor) in prefix.layers.items():
        tensors[f"layers.{layer}.key"], tensors[f"layers.{layer}.value"] = key_tensor, value_tensor
    entries: dict[str, object] = {"__metadata__": metadata}
    parts, position = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        part = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(part)],
        }
        parts.append(part)
        position += len(part)
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def digest_of(body: bytes) -> str:
    """sha256 of a canonical file, in hex."""
    return hashlib.sha256(body).hexdigest()


def _checked_metadata(header: Header) -> dict[str, str]:
    metadata = dict(header.metadata)
    if metadata.get("format") != FORMAT:
        raise InvalidArtefactError(
            f"__metadata__.format must be {FORMAT!r}, got {metadata.get('format')!r} (a PEFT file needs its "
            "adapter_config.json: send both as multipart)"
        )
    if metadata.get("kind") not in ("kv", "soft"):
        raise InvalidArtefactError(f"__metadata__.kind must be 'kv' or 'soft', got {metadata.get('kind')!r}")
    unknown = set(metadata) - METADATA_KEYS
    if unknown:
        raise InvalidArtefactError(f"__metadata__ has {_some(unknown)}; known are {', '.join(sorted(METADATA_KEYS))}")
    placement = metadata.get("placement", "prefix")
    if placement != "prefix":
        raise InvalidArtefactError(f"__metadata__.placement must be 'prefix', got {placement!r}")
    if "separator" in metadata:
        raise InvalidArtefactError("__metadata__.separator belongs to a KV infix, this is a prefix")
    for key in ("base_model", "fingerprint"):
        if len(metadata.get(key, "")) > MAX_TEXT:
            raise InvalidArtefactError(f"__metadata__.{key} must be <= {MAX_TEXT} characters")
    return metadata


def _check_sizes_before_load(header: Header, shape: ModelShape) -> None:
    """The shapes from the header alone, so that nothing is allocated for a file that cannot fit."""
    for name, tensor in header.tensors.items():
        if name == "embeddings":
            expected = f"[num_virtual_tokens, {shape.hidden_size}]"
            fits = len(tensor.shape) == 2 and tensor.shape[1] == shape.hidden_size
        else:
            expected = f"[{shape.num_kv_heads}, num_virtual_tokens, {shape.head_dim}]"
            sizes = (shape.num_kv_heads, shape.head_dim)
            fits = len(tensor.shape) == 3 and (tensor.shape[0], tensor.shape[2]) == sizes
        if not fits:
            raise InvalidArtefactError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")


def _some(names: set[str]) -> str:
    listed = ", ".join(repr(name[:60]) for name in sorted(names)[:4])
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")
