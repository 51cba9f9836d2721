"""The native file, `prefixserve/1`: one canonical safetensors file an artefact; its sha256 is the digest."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import PARTS, ModelShape, Prefix
from prefix_store.printable import first_unprintable
from prefix_store.safetensors_header import Header, load_tensors, max_header_bytes, read_header
from prefix_store.validation import check_architecture, validate

FORMAT = "prefixserve/1"
LAYER_NAME = re.compile(r"(?:(encoder|decoder|cross)\.)?layers\.(0|[1-9][0-9]{0,4})\.(key|value)")
METADATA_KEYS = {"format", "kind", "placement", "separator", "base_model", "fingerprint"}
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
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
    header = read_header(body, max_header_bytes(2 * shape.num_layers + shape.num_encoder_layers))
    metadata = _checked_metadata(header)
    names = set(header.tensors)
    of_parts = {name for name in names if name.startswith(tuple(f"{part}." for part in PARTS))}
    is_seq2seq = bool(of_parts) and (shape.is_encoder_decoder or of_parts == names)
    check_architecture(is_seq2seq, shape)
    fields: dict[str, Any] = {
        "placement": metadata.get("placement", "prefix"),
        "separator": _separator(metadata.get("separator")),
        "is_seq2seq": is_seq2seq,
        "base_model": metadata.get("base_model"),
        "fingerprint": metadata.get("fingerprint"),
    }
    if metadata["kind"] == "soft":
        expected = "encoder.embeddings" if is_seq2seq else "embeddings"
        if names != {expected}:
            raise InvalidArtefactError(f"a soft prompt has one tensor, {expected}; got {_some(names)}")
        _check_sizes_before_load(header, shape)
        prefix = Prefix("soft", embeddings=load_tensors(body)[expected], **fields)
    else:
        _check_layer_names(names, is_seq2seq, shape)
        _check_sizes_before_load(header, shape)
        tensors = load_tensors(body)
        found: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {part: {} for part in PARTS}
        for name in sorted(names):
            part, layer, which = _layer_name(name)
            if which == "key":
                found[part][layer] = (tensors[name], tensors[name.removesuffix("key") + "value"])
        ordered = {part: dict(sorted(layers.items())) for part, layers in found.items()}
        prefix = Prefix("kv", layers=ordered["decoder"], encoder=ordered["encoder"], cross=ordered["cross"], **fields)
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
    tensors = {}
    if prefix.embeddings is not None:
        tensors["encoder.embeddings" if prefix.is_seq2seq else "embeddings"] = prefix.embeddings
    for part, layers in prefix.parts():
        where = f"{part}." if prefix.is_seq2seq else ""
        for layer, (key_tensor, value_tensor) in layers.items():
            tensors[f"{where}layers.{layer}.key"] = key_tensor
            tensors[f"{where}layers.{layer}.value"] = value_tensor
    entries: dict[str, object] = {"__metadata__": metadata}
    parts, position = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        part_bytes = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(part_bytes)],
        }
        parts.append(part_bytes)
        position += len(part_bytes)
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
            f"__metadata__.format must be {FORMAT!r}, got {_quoted(metadata.get('format'))} (a PEFT file needs its "
            "adapter_config.json: both in one folder, or over HTTP as multipart)"
        )
    if metadata.get("kind") not in ("kv", "soft"):
        raise InvalidArtefactError(f"__metadata__.kind must be 'kv' or 'soft', got {_quoted(metadata.get('kind'))}")
    unknown = set(metadata) - METADATA_KEYS
    if unknown:
        raise InvalidArtefactError(f"__metadata__ has {_some(unknown)}; known are {', '.join(sorted(METADATA_KEYS))}")
    for key in ("base_model", "fingerprint"):
        text = metadata.get(key, "")
        if len(text) > MAX_TEXT:
            raise InvalidArtefactError(f"__metadata__.{key} must be <= {MAX_TEXT} printable characters")
        if found := first_unprintable(text):
            raise InvalidArtefactError(f"__metadata__.{key} must be printable text on one line, got {found}")
    return metadata


def _separator(text: str | None) -> int | None:
    if text is None:
        return None
    if not NUMBER.fullmatch(text):
        raise InvalidArtefactError(f"__metadata__.separator must be a token id, got {text[:40]!r}")
    return int(text)


def _layer_name(name: str) -> tuple[str, int, str]:
    """The part (`decoder` where none is named), the layer, and `key` or `value`."""
    match = LAYER_NAME.fullmatch(name)
    assert match is not None, "names are checked before"
    return match[1] or "decoder", int(match[2]), match[3]


def _check_layer_names(names: set[str], is_seq2seq: bool, shape: ModelShape) -> None:
    matches = {name: LAYER_NAME.fullmatch(name) for name in names}
    wrong = {name for name, match in matches.items() if match is None or (match[1] is not None) != is_seq2seq}
    if wrong:
        where = "(encoder|decoder|cross).layers.N" if is_seq2seq else "layers.N"
        last = max(shape.num_layers, shape.num_encoder_layers) - 1
        raise InvalidArtefactError(
            f"a KV prefix has {where}.key and {where}.value only (N from 0 to {last}); got {_some(wrong)}"
        )
    for name in sorted(names):
        stem, _, which = name.rpartition(".")
        other = f"{stem}.{'value' if which == 'key' else 'key'}"
        if other not in names:
            raise InvalidArtefactError(f"{other} is missing")


def _check_sizes_before_load(header: Header, shape: ModelShape) -> None:
    """The shapes from the header alone, so that nothing is allocated for a file that cannot fit."""
    for name, tensor in header.tensors.items():
        if name.endswith("embeddings"):
            expected = f"[num_virtual_tokens, {shape.hidden_size}]"
            fits = len(tensor.shape) == 2 and tensor.shape[1] == shape.hidden_size
        else:
            part, layer, which = _layer_name(name)
            layer_shape = shape.layer(layer if part == "decoder" and layer < shape.num_layers else 0)
            num_heads = layer_shape.num_kv_heads
            dim = layer_shape.key_dim if which == "key" else layer_shape.value_dim
            expected = f"[{num_heads}, num_virtual_tokens, {dim}]"
            fits = len(tensor.shape) == 3 and (tensor.shape[0], tensor.shape[2]) == (num_heads, dim)
        if not fits:
            raise InvalidArtefactError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")


def _quoted(text: str | None) -> str:
    return "none" if text is None else repr(text[:100])


def _some(names: set[str]) -> str:
    listed = ", ".join(repr(name[:60]) for name in sorted(names)[:4])
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")
