"""PEFT's `adapter_config.json` and `adapter_model.safetensors` to a Prefix.

Every type saves one tensor `prompt_embeddings`; only `peft_type` tells what it is. What a reparameterisation (an MLP,
an LSTM, a delta) does to it, PEFT has applied when saving.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.safetensors_header import Header, max_header_bytes, read_header
from prefix_store.validation import check_rank, check_values, validate

SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK = "MULTITASK_PROMPT_TUNING"
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
    tensors = safetensors.torch.load(weights)
    for name, tensor in tensors.items():
        check_values(name, tensor, shape.dtype)
    table = tensors["prompt_embeddings"]
    base_model = fields.get("base_model_name_or_path") or None
    if peft_type in KV_TYPES:
        slots = table.view(table.shape[0], 2 * shape.num_layers, shape.num_kv_heads, shape.head_dim)
        slots = slots.permute(1, 2, 0, 3).contiguous()
        places = [_key_and_value(i, shape) for i in range(shape.num_layers)]
        layers = {i: (slots[key], slots[value]) for i, (key, value) in enumerate(places)}
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
            f"modules_to_save must be empty, got {str(fields['modules_to_save'])[:100]}: right answers would need "
            "trained weights of the model itself"
        )
    if _has_remote_code(fields):
        raise InvalidArtefactError("trust_remote_code must be false everywhere, got true")
    task_type = fields.get("task_type")
    if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"):
        raise InvalidArtefactError(
            f"task_type must be CAUSAL_LM, got {task_type}: train it as CAUSAL_LM and serve it with /score"
        )
    if task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise InvalidArtefactError(f"task_type must be CAUSAL_LM or SEQ_2_SEQ_LM, got {str(task_type)[:60]!r}")
    base = fields.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or len(base) > 500):
        raise InvalidArtefactError("base_model_name_or_path must be a text of at most 500 characters")
    return fields


def _check_task_type(fields: dict[str, Any], shape: ModelShape) -> None:
    expected = "SEQ_2_SEQ_LM" if shape.is_encoder_decoder else "CAUSAL_LM"
    if fields.get("task_type") not in (None, expected):
        kind = "an encoder-decoder" if shape.is_encoder_decoder else "decoder-only"
        raise InvalidArtefactError(
            f"task_type must be {expected}, got {fields['task_type']}: the served model is {kind}"
        )


def _key_and_value(layer: int, shape: ModelShape) -> tuple[int, int]:
    """The slots of a layer's key and value. For an encoder-decoder PEFT doubles the list of 2L slots and splits it
    by 4, and gives the first two of each four to the decoder's self-attention."""
    if not shape.is_encoder_decoder:
        return 2 * layer, 2 * layer + 1
    num_slots = 2 * shape.num_layers
    return 4 * layer % num_slots, (4 * layer + 1) % num_slots


def _has_remote_code(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("trust_remote_code")) or any(_has_remote_code(child) for child in value.values())
    return isinstance(value, list) and any(_has_remote_code(child) for child in value)


def _check_shapes(fields: dict[str, Any], header: Header, shape: ModelShape) -> None:
    """From the header, before anything is loaded."""
    found = header.tensors["prompt_embeddings"].shape
    if len(found) != 2:
        raise InvalidArtefactError(f"prompt_embeddings: expected 2 dimensions, got {list(found)}")
    n = fields.get("num_virtual_tokens")
    # Of an encoder-decoder a soft prompt's file has rows for both stacks.
    num_stacks = 2 if shape.is_encoder_decoder and fields["peft_type"] not in KV_TYPES else 1
    if found[0] % num_stacks or (n is not None and (type(n) is not int or found[0] != num_stacks * n)):
        raise InvalidArtefactError(
            f"prompt_embeddings: num_virtual_tokens is {str(n)[:40]}, for {num_stacks} stacks; "
            f"the tensor has {found[0]} rows"
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
    return table * (cols[index] @ rows[index])
