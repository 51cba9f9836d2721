"""PEFT's `adapter_config.json` and `adapter_model.safetensors` to a Prefix.

Every type saves one tensor `prompt_embeddings`; only `peft_type` tells what it is. What a reparameterisation (an MLP,
an LSTM, a delta) does to it, PEFT has applied when saving.
"""

from __future__ import annotations

from typing import Any

import torch

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError
from prefix_store.fold import split_slots
from prefix_store.prefix import Layers, ModelShape, Prefix
from prefix_store.safetensors_header import Header, load_tensors, max_header_bytes, read_header
from prefix_store.validation import check_rank, check_values, validate

SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK = "MULTITASK_PROMPT_TUNING"
TASKS_WITHOUT_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
MAX_CONFIG_BYTES = 64 * 1024


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
    _check_shapes(fields, header, shape)
    tensors = load_tensors(weights)
    for name, tensor in tensors.items():
        check_values(name, tensor, shape.dtype)
    table = tensors["prompt_embeddings"]
    base_model = fields.get("base_model_name_or_path") or None
    if peft_type in KV_TYPES:
        layers = decoder_layers(split_slots(table, shape.num_layers, shape), shape)
        prefix = Prefix("kv", layers=layers, is_seq2seq=shape.is_encoder_decoder, base_model=base_model)
    else:
        if peft_type == MULTITASK:
            table = _pick_task(table, tensors["prefix_task_cols"], tensors["prefix_task_rows"], index)
        if shape.is_encoder_decoder:
            table = table[: table.shape[0] // 2].contiguous()  # the encoder's; PEFT trains no use of the rest
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
            f"peft_type must be one of {', '.join(known)}, got {str(peft_type)[:60]!r}: "
            "it cannot be expressed as a prefix"
        )
    if fields.get("modules_to_save"):
        raise InvalidArtefactError(
            f"modules_to_save must be empty, got {repr(fields['modules_to_save'])[:100]}: right answers would need "
            "trained weights of the model itself"
        )
    if _has_remote_code(fields):
        raise InvalidArtefactError("trust_remote_code must be false everywhere, got true")
    base = fields.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or len(base) > 500 or not base.isprintable()):
        raise InvalidArtefactError("base_model_name_or_path must be a text of at most 500 printable characters")
    return fields


def _check_task_type(fields: dict[str, Any], shape: ModelShape) -> None:
    expected, other = "CAUSAL_LM", "SEQ_2_SEQ_LM"
    if shape.is_encoder_decoder:
        expected, other = other, expected
    task_type = fields.get("task_type")
    if task_type in (None, expected):
        return
    reason = ""
    if task_type == other:
        reason = f": the served model is {'an encoder-decoder' if shape.is_encoder_decoder else 'decoder-only'}"
    elif task_type in TASKS_WITHOUT_TEXT:
        reason = f": train it as {expected} and serve it with /score"
    raise InvalidArtefactError(f"task_type must be {expected}, got {str(task_type)[:60]!r}{reason}")


def decoder_layers(slots: torch.Tensor, shape: ModelShape) -> Layers:
    """What PEFT makes of `[2 * num_layers, num_kv_heads, n, head_dim]`: for an encoder-decoder it doubles the list of
    slots and splits it by 4, and gives the first two of each four to the decoder's self-attention."""
    step = 4 if shape.is_encoder_decoder else 2
    keys = [step * layer % len(slots) for layer in range(shape.num_layers)]
    return {layer: (slots[key], slots[key + 1]) for layer, key in enumerate(keys)}


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


def _check_shapes(fields: dict[str, Any], header: Header, shape: ModelShape) -> None:
    """From the header, before anything is loaded."""
    found = header.tensors["prompt_embeddings"].shape
    if len(found) != 2:
        raise InvalidArtefactError(f"prompt_embeddings: expected 2 dimensions, got {list(found)}")
    n = fields.get("num_virtual_tokens")
    # Of an encoder-decoder a soft prompt's file has rows for both stacks.
    num_stacks = 2 if shape.is_encoder_decoder and fields["peft_type"] not in KV_TYPES else 1
    if found[0] % num_stacks or (n is not None and (type(n) is not int or found[0] != num_stacks * n)):
        stacks = "" if num_stacks == 1 else " for encoder and decoder each"
        raise InvalidArtefactError(
            f"prompt_embeddings: num_virtual_tokens is {repr(n)[:40]}{stacks}, the tensor has {found[0]} rows"
        )
    if fields["peft_type"] not in KV_TYPES:
        if found[1] != shape.hidden_size:
            raise InvalidArtefactError(f"prompt_embeddings: width must be {shape.hidden_size}, got {found[1]}")
        return
    if type(fields.get("num_layers")) is int and fields["num_layers"] != shape.num_layers:
        raise InvalidArtefactError(f"num_layers must be {shape.num_layers}, got {fields['num_layers']}")
    heads, width = shape.num_kv_heads, shape.num_kv_heads * shape.head_dim
    expected = 2 * shape.num_layers * width
    if found[1] != expected:
        raise InvalidArtefactError(
            f"prompt_embeddings: width must be {expected} (2 * {shape.num_layers} layers * {heads} KV heads * "
            f"{shape.head_dim}), got {found[1]}; a file without the model's grouped heads cannot be served"
        )
    for name, value in (("num_attention_heads", heads), ("token_dim", width)):
        if type(fields.get(name)) is int and fields[name] != value:
            raise InvalidArtefactError(f"{name} must be {value} (of the model's KV heads), got {fields[name]}")


def _pick_task(table: torch.Tensor, cols: torch.Tensor, rows: torch.Tensor, index: int | None) -> torch.Tensor:
    """`prompt_embeddings * (cols[index] @ rows[index])` (Wang et al., 2023)."""
    check_rank("prefix_task_cols", cols, 3, "[num_tasks, num_virtual_tokens, num_ranks]")
    check_rank("prefix_task_rows", rows, 3, "[num_tasks, num_ranks, hidden_size]")
    expected = (cols.shape[0], table.shape[0], cols.shape[2], table.shape[1])
    found = (rows.shape[0], cols.shape[1], rows.shape[1], rows.shape[2])
    if expected != found:
        raise InvalidArtefactError(
            f"prefix_task_cols {list(cols.shape)} and prefix_task_rows {list(rows.shape)} do not fit each other and "
            f"prompt_embeddings {list(table.shape)}"
        )
    if index is None and cols.shape[0] == 1:
        index = 0
    if index is None or not 0 <= index < cols.shape[0]:
        raise InvalidArtefactError(f"index must be 0 to {cols.shape[0] - 1} for this multitask file, got {index}")
    factors = (table, cols[index], rows[index])
    if len({tensor.dtype for tensor in factors}) > 1 or table.dtype.itemsize == 1:
        factors = (table.float(), cols[index].float(), rows[index].float())  # torch mixes no dtypes; float8 has no room
    return factors[0] * (factors[1] @ factors[2])
