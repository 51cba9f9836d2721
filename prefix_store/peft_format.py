"""PEFT's `adapter_config.json` and `adapter_model.safetensors` to a Prefix.

Every type saves one tensor `prompt_embeddings`; only `peft_type` tells what it is. What a reparameterisation (an MLP,
an LSTM, a delta) does to it, PEFT has applied when saving. A file is served as PEFT's `generate` answers with it alone,
or refused: a size that the config names must be the tensor's, a size that is null is the one that PEFT takes for it.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from prefix_store.bounded_json import read_json_object, shown
from prefix_store.errors import InvalidArtefactError
from prefix_store.fold import split_slots
from prefix_store.prefix import Layers, ModelShape, Prefix
from prefix_store.printable import first_unprintable
from prefix_store.safetensors_header import Header, load_tensors, max_header_bytes, read_header
from prefix_store.validation import check_rank, check_values, validate

SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK = "MULTITASK_PROMPT_TUNING"
TASKS_WITHOUT_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
MAX_CONFIG_BYTES = 64 * 1024
MAX_LAYERS = 4096


def read_peft(config: bytes, weights: bytes, shape: ModelShape, index: int | None = None) -> Prefix:
    """A validated prefix. `index` picks one task of a multitask file. Raises InvalidArtefactError."""
    fields = _checked_config(config)
    _check_task_type(fields, shape)
    peft_type = fields["peft_type"]
    header = read_header(weights, max_header_bytes(shape.num_layers))
    names = {"prompt_embeddings"}
    if peft_type == MULTITASK:
        names |= {"prefix_task_cols", "prefix_task_rows"}
    if set(header.tensors) != names:
        found = ", ".join(repr(name[:60]) for name in sorted(header.tensors)[:4])
        raise InvalidArtefactError(f"{peft_type} has the tensors {', '.join(sorted(names))}; got {found}")
    if index is not None and peft_type != MULTITASK:
        raise InvalidArtefactError(f"index picks a task of a {MULTITASK} file, this is {peft_type}")
    num_rows = _check_shapes(fields, header, shape)
    tensors = load_tensors(weights)
    for name, tensor in tensors.items():
        check_values(name, tensor, shape.dtype)
        if tensor.dtype == torch.float64:
            tensors[name] = tensor.float()  # PEFT's own parameters are in single precision
    table = tensors["prompt_embeddings"]
    base_model = fields.get("base_model_name_or_path") or None
    if peft_type in KV_TYPES:
        layers = decoder_layers(split_slots(table, shape), shape)
        prefix = Prefix("kv", layers=layers, is_seq2seq=shape.is_encoder_decoder, base_model=base_model)
    else:
        if peft_type == MULTITASK:
            table = _pick_task(fields, table, tensors["prefix_task_cols"], tensors["prefix_task_rows"], index)
        table = table[:num_rows].contiguous()  # the first stack's; PEFT trains no use of the rest
        prefix = Prefix("soft", embeddings=table, is_seq2seq=shape.is_encoder_decoder, base_model=base_model)
    validate(prefix, shape)
    return prefix


def num_tasks(config: bytes, weights: bytes) -> int:
    """How many artefacts the file holds: more than one only for MULTITASK_PROMPT_TUNING."""
    if _checked_config(config)["peft_type"] != MULTITASK:
        return 1
    cols = read_header(weights).tensors.get("prefix_task_cols")
    return cols.shape[0] if cols else 1


def _checked_config(config: bytes) -> dict[str, Any]:
    fields = read_json_object(config, "adapter_config.json", MAX_CONFIG_BYTES)
    peft_type = fields.get("peft_type")
    known = (*SOFT_TYPES, MULTITASK, *KV_TYPES)
    if peft_type not in known:
        raise InvalidArtefactError(
            f"peft_type must be one of {', '.join(known)}, got {shown(peft_type)}: it cannot be expressed as a prefix"
        )
    if fields.get("modules_to_save"):
        raise InvalidArtefactError(
            f"modules_to_save must be empty, got {json.dumps(fields['modules_to_save'])[:100]}: right answers would "
            "need trained weights of the model itself"
        )
    if _has_remote_code(fields):
        raise InvalidArtefactError("trust_remote_code must be false everywhere, got true")
    base = fields.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or len(base) > 500):
        raise InvalidArtefactError("base_model_name_or_path must be a text of at most 500 printable characters")
    if base is not None and (found := first_unprintable(base)):
        raise InvalidArtefactError(f"base_model_name_or_path must be printable text on one line, got {found}")
    return fields


def _check_task_type(fields: dict[str, Any], shape: ModelShape) -> None:
    expected, other = "CAUSAL_LM", "SEQ_2_SEQ_LM"
    if shape.is_encoder_decoder:
        expected, other = other, expected
    task_type = fields.get("task_type")
    if task_type == expected:
        return
    reason = ""
    if task_type is None:
        reason = ": without it PEFT answers as if there were no prefix"
    elif task_type == other:
        reason = f": the served model is {'an encoder-decoder' if shape.is_encoder_decoder else 'decoder-only'}"
    elif task_type in TASKS_WITHOUT_TEXT:
        reason = f": answers are text here; train it as {expected}, with the label as the answer"
    raise InvalidArtefactError(f"task_type must be {expected}, got {shown(task_type)}{reason}")


def decoder_layers(slots: torch.Tensor, shape: ModelShape) -> Layers:
    """Keys and values of each layer, as PEFT makes them of the slots `[2 * num_layers, num_kv_heads, n, head_dim]` of a
    file, with the file's `num_layers`.

    For an encoder-decoder it doubles the list of slots and splits it by 4, and gives the first two of each four to the
    decoder's self-attention. A layer that reads another layer's cache has no use for its slots. Where layers differ, a
    narrower one takes the first heads and values of its slots, and one with more heads than the file gets no prefix.
    """
    step = 4 if shape.is_encoder_decoder else 2
    _, num_heads, _, width = slots.shape
    found = {}
    for index in shape.kv_layers:
        layer, at = shape.layer(index), step * index % len(slots)
        if layer.num_kv_heads <= num_heads and layer.key_dim <= width:
            key, value = (slots[i, : layer.num_kv_heads, :, : layer.key_dim].contiguous() for i in (at, at + 1))
            found[index] = (key, value)
    return found


def _has_remote_code(fields: dict[str, Any]) -> bool:
    """At any depth: a config nests as deeply as its bytes allow, so what is still to be seen is a list."""
    unseen: list[Any] = [fields]
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict):
            if value.get("trust_remote_code"):
                return True
            unseen.extend(value.values())
        elif isinstance(value, list):
            unseen.extend(value)
    return False


def _check_shapes(fields: dict[str, Any], header: Header, shape: ModelShape) -> int:
    """The number of rows that are served, `num_virtual_tokens`. Reads the header only, before a tensor is loaded.

    Raises InvalidArtefactError for shapes that do not fit the model."""
    found = header.tensors["prompt_embeddings"].shape
    if len(found) != 2:
        raise InvalidArtefactError(f"prompt_embeddings: expected 2 dimensions, got {list(found)}")
    num_stacks = _num_stacks(fields, shape)
    n = fields.get("num_virtual_tokens")
    if found[0] % num_stacks or (n is not None and (type(n) is not int or found[0] != num_stacks * n)):
        stacks = "" if num_stacks == 1 else f" for each of {shown(num_stacks)} stacks"
        raise InvalidArtefactError(
            f"prompt_embeddings: num_virtual_tokens is {shown(n)}{stacks}, the tensor has {found[0]} rows"
        )
    if fields["peft_type"] in KV_TYPES:
        _check_kv_width(fields, found[1], shape)
        return found[0]
    if found[1] != shape.hidden_size:
        raise InvalidArtefactError(f"prompt_embeddings: width must be {shape.hidden_size}, got {found[1]}")
    _check_claim(fields, "token_dim", shape.hidden_size)
    if fields["peft_type"] == "CPT":
        _check_cpt(fields, found[0], shape)
    return found[0] // num_stacks


def _num_stacks(fields: dict[str, Any], shape: ModelShape) -> int:
    """The stacks of the model that the tensor has rows for, by `num_transformer_submodules`.

    PEFT serves the first `num_virtual_tokens` rows of an encoder-decoder's soft prompt, however many stacks there are.
    Keys and values have one set of rows; the number decides how PEFT lays them out, and one layout is served.
    """
    is_kv = fields["peft_type"] in KV_TYPES
    expected = 2 if shape.is_encoder_decoder else 1
    found = fields.get("num_transformer_submodules")
    if found is None:
        found = expected
    may_differ = shape.is_encoder_decoder and not is_kv
    if type(found) is not int or found < 1 or (found != expected and not may_differ):
        what = (
            f"{fields['peft_type']} of {'an encoder-decoder' if shape.is_encoder_decoder else 'a decoder-only model'}"
        )
        raise InvalidArtefactError(
            f"num_transformer_submodules must be {'at least 1' if may_differ else expected} for {what}, got "
            f"{shown(found)}: files for another number are not served; train it without this field"
        )
    return 1 if is_kv else found


def _check_kv_width(fields: dict[str, Any], found: int, shape: ModelShape) -> None:
    if any(layer.key_dim != layer.value_dim for layer in shape.layers):
        raise InvalidArtefactError(
            f"{shape.model_name} has keys and values of different widths, which a {fields['peft_type']} file cannot "
            "have; a soft prompt or a native file can be served"
        )
    num_layers = _num_layers(fields, shape)
    heads, width = shape.num_kv_heads, shape.num_kv_heads * shape.head_dim
    expected = 2 * num_layers * width
    if found != expected:
        raise InvalidArtefactError(
            f"prompt_embeddings: width must be {expected} (2 * {num_layers} layers * {heads} KV heads * "
            f"{shape.head_dim}), got {found}; a file without the model's grouped heads cannot be served"
        )
    _check_claim(fields, "num_attention_heads", heads, " (of the model's KV heads)")
    _check_claim(fields, "token_dim", width, " (of the model's KV heads)")


def _num_layers(fields: dict[str, Any], shape: ModelShape) -> int:
    """The layers by which PEFT lays a file out: of an encoder-decoder its encoder's, unless the config has others."""
    if not shape.is_encoder_decoder:
        _check_claim(fields, "num_layers", shape.num_layers)
        return shape.num_layers
    found = fields.get("num_layers")
    if found is None:
        found = shape.num_encoder_layers
    if type(found) is not int or not shape.num_layers <= found <= MAX_LAYERS:
        raise InvalidArtefactError(
            f"num_layers must be {shape.num_layers} (the decoder's layers) to {MAX_LAYERS}, got {shown(found)}: "
            f"with fewer PEFT fails at the layers above; train it with num_layers={shape.num_layers}"
        )
    return found


def _check_cpt(fields: dict[str, Any], num_rows: int, shape: ModelShape) -> None:
    if shape.is_encoder_decoder:
        raise InvalidArtefactError("peft_type CPT is for decoder-only models in PEFT, the served model is none")
    ids = fields.get("cpt_token_ids")
    if ids is not None and (not isinstance(ids, list) or len(ids) != num_rows):
        got = f"{len(ids)} of them" if isinstance(ids, list) else shown(ids)
        raise InvalidArtefactError(f"cpt_token_ids must be a list of {num_rows}, as many as rows, got {got}")


def _check_claim(fields: dict[str, Any], name: str, expected: int, note: str = "") -> None:
    """A size that the config names is the one that is served."""
    found = fields.get(name)
    if found is not None and (type(found) is not int or found != expected):
        raise InvalidArtefactError(f"{name} must be {expected}{note}, got {shown(found)}")


def _pick_task(
    fields: dict[str, Any], table: torch.Tensor, cols: torch.Tensor, rows: torch.Tensor, index: int | None
) -> torch.Tensor:
    """`prompt_embeddings * (cols[index] @ rows[index])` (Wang et al., 2023), in single precision as in PEFT."""
    check_rank("prefix_task_cols", cols, 3, "[num_tasks, num_virtual_tokens, num_ranks]")
    check_rank("prefix_task_rows", rows, 3, "[num_tasks, num_ranks, hidden_size]")
    expected = (cols.shape[0], table.shape[0], cols.shape[2], table.shape[1])
    found = (rows.shape[0], cols.shape[1], rows.shape[1], rows.shape[2])
    if expected != found:
        raise InvalidArtefactError(
            f"prefix_task_cols {list(cols.shape)} and prefix_task_rows {list(rows.shape)} do not fit each other and "
            f"prompt_embeddings {list(table.shape)}"
        )
    _check_claim(fields, "num_tasks", cols.shape[0])
    _check_claim(fields, "num_ranks", cols.shape[2])
    if index is None and cols.shape[0] == 1:
        index = 0
    if index is None or not 0 <= index < cols.shape[0]:
        got = "none" if index is None else index
        raise InvalidArtefactError(f"index must be 0 to {cols.shape[0] - 1} for this multitask file, got {got}")
    return table.float() * (cols[index].float() @ rows[index].float())
