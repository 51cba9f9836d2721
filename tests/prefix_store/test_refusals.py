"""Every artefact that cannot be served is refused with the reason: what was expected, and what came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from prefix_store.blobs import Blobs
from prefix_store.bounded_json import shown
from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import read_native, write_native
from prefix_store.peft_format import read_peft
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.safetensors_header import read_header
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.validation import validate

LAYERS, HEADS, DIM, HIDDEN, N = 3, 2, 8, 48, 4
SHAPE = ModelShape(LAYERS, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64, max_virtual_tokens=64)
WIDTH = 2 * LAYERS * HEADS * DIM
KV = {"format": "prefixserve/1", "kind": "kv"}
SOFT = {"format": "prefixserve/1", "kind": "soft"}
PREFIX_TYPES = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    opened = PrefixStore(SqliteRegistry(tmp_path / "registry.sqlite"), Blobs(tmp_path / "blobs"), SHAPE)
    yield opened
    opened.close()


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def kv(layers: int = LAYERS) -> dict[str, torch.Tensor]:
    names = [f"layers.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return {name: random(HEADS, N, DIM) for name in names}


def native(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    if metadata is None:
        metadata = SOFT if "embeddings" in tensors else KV
    return safetensors.torch.save(tensors, metadata)


def by_hand(header: dict[str, Any] | bytes, num_bytes: int) -> bytes:
    """A file with this header and so many zeros, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def entry(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def refused_native(body: bytes, *texts: str, shape: ModelShape = SHAPE) -> None:
    with pytest.raises(InvalidArtefactError) as caught:
        read_native(body, shape)
    for text in texts:
        assert text in str(caught.value)


def refused_peft(fields: dict[str, Any] | bytes, tensors: dict[str, torch.Tensor] | bytes, *texts: str) -> None:
    config = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    weights = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
    with pytest.raises(InvalidArtefactError) as caught:
        read_peft(config, weights, SHAPE)
    for text in texts:
        assert text in str(caught.value)


def config(kind: str, **more: Any) -> dict[str, Any]:
    return {"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": N} | more


def prefix_config(**more: Any) -> dict[str, Any]:
    sizes = {"num_layers": LAYERS, "num_attention_heads": HEADS, "token_dim": HEADS * DIM}
    return config("PREFIX_TUNING", **(sizes | more))


LONE = "\ud800"  # half of a pair: no text that can be sent has it
PROMPT = {"prompt_embeddings": random(N, HIDDEN)}
PREFIX = {"prompt_embeddings": random(N, WIDTH)}


# What the refusals below stand against: each of these is taken.


def test_right_artefacts_are_taken(store: PrefixStore) -> None:
    assert store.parse_native(native(kv())).num_virtual_tokens == N
    assert store.parse_native(native({"embeddings": random(N, HIDDEN)})).num_virtual_tokens == N
    for kind in PREFIX_TYPES - {"MULTITASK_PROMPT_TUNING"}:
        fields, tensors = config(kind), PROMPT
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            fields, tensors = prefix_config(peft_type=kind), PREFIX
        found = store.parse_peft(json.dumps(fields).encode(), safetensors.torch.save(tensors))
        assert found.num_virtual_tokens == N


# Rank, width, layers, dtype, length.


@pytest.mark.parametrize("sizes", [(N, DIM), (1, HEADS, N, DIM), (HEADS + 1, N, DIM), (HEADS, N, DIM + 1), (64,)])
def test_kv_of_another_rank_or_width(sizes: tuple[int, ...]) -> None:
    body = native(kv() | {"layers.1.key": torch.zeros(sizes)})
    refused_native(body, f"layers.1.key: expected shape [2, num_virtual_tokens, 8], got {list(sizes)}")


@pytest.mark.parametrize("sizes", [(N, HIDDEN + 1), (HIDDEN,), (1, N, HIDDEN)])
def test_soft_prompt_of_another_rank_or_width(sizes: tuple[int, ...]) -> None:
    body = native({"embeddings": torch.zeros(sizes)})
    refused_native(body, f"embeddings: expected shape [num_virtual_tokens, 48], got {list(sizes)}")


def test_layer_that_the_model_lacks() -> None:
    refused_native(native(kv(LAYERS + 1)), "layers.3: the model has 3 layers (0 to the last)")


def test_layers_of_different_lengths() -> None:
    body = native(kv() | {"layers.2.value": torch.zeros(HEADS, N + 1, DIM)})
    refused_native(body, "layers.2.value: num_virtual_tokens (as in the other layers) must be 4, got 5")


def test_key_without_its_value() -> None:
    tensors = kv()
    del tensors["layers.1.value"]
    refused_native(native(tensors), "layers.1.value is missing")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.int8, "I8"), (torch.bool, "BOOL")])
def test_dtype_that_is_not_floating(dtype: torch.dtype, name: str) -> None:
    body = native({name: tensor.to(dtype) for name, tensor in kv().items()})
    refused_native(body, f"dtype must be floating (F64, F32, F16, BF16, F8_E4M3, F8_E5M2), got {name!r}")


@pytest.mark.parametrize("num_tokens", [65, 5000])
def test_longer_than_the_limit(num_tokens: int) -> None:
    body = native({"embeddings": random(num_tokens, HIDDEN)})
    refused_native(body, f"num_virtual_tokens must be 1 to 64, got {num_tokens}")


def test_as_long_as_the_context() -> None:
    short = replace(SHAPE, max_positions=10)
    assert read_native(native({"embeddings": random(8, HIDDEN)}), short).num_virtual_tokens == 8
    refused_native(native({"embeddings": random(9, HIDDEN)}), "num_virtual_tokens must be 1 to 8, got 9", shape=short)


# Values.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(dtype: torch.dtype, value: float) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in kv().items()}
    wrong = tensors["layers.2.value"].float()
    wrong[1, 3, 7] = value
    tensors["layers.2.value"] = wrong.to(dtype)
    refused_native(native(tensors), "layers.2.value: all values must be finite, got NaN or infinity")


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_largest_magnitude(model_dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=model_dtype)
    for value in (65_504.0, -65_504.0):
        read_native(native({"embeddings": torch.full((N, HIDDEN), value)}), shape)
    for value, text in ((65_504.01, "65504.0117"), (-65_505.0, "65505"), (70_000.0, "70000"), (3e38, "3.00000001e+38")):
        body = native({"embeddings": torch.full((N, HIDDEN), value)})
        refused_native(body, f"embeddings: magnitudes must be <= 65504, got {text}", shape=shape)


def test_double_that_single_precision_cannot_hold() -> None:
    body = native({"embeddings": torch.full((N, HIDDEN), 1e300, dtype=torch.float64)})
    refused_native(body, "embeddings: magnitudes must be <= 65504, got 1e+300")


def test_brain_float_above_half_precision() -> None:
    body = native({"embeddings": torch.full((N, HIDDEN), 65_536.0, dtype=torch.bfloat16)})
    refused_native(body, "magnitudes must be <= 65504, got 65536", shape=replace(SHAPE, dtype=torch.float16))


# The file itself.


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04\x95\x10\x00\x00\x00\x00"])
def test_zip_and_pickle(start: bytes) -> None:
    refused_native(start + bytes(4000), "expected a safetensors file, got a zip or a pickle")
    refused_peft(config("PROMPT_TUNING"), start + bytes(4000), "got a zip or a pickle; save it with safetensors")


def test_torch_file_as_weights(tmp_path: Path) -> None:
    torch.save(PROMPT, tmp_path / "adapter_model.bin")
    body = (tmp_path / "adapter_model.bin").read_bytes()
    refused_peft(config("PROMPT_TUNING"), body, "expected a safetensors file, got a zip or a pickle")


@pytest.mark.parametrize("num_bytes", [0, 1, 7])
def test_too_short_for_a_header(num_bytes: int) -> None:
    refused_native(bytes(num_bytes), f"expected a safetensors file, got {num_bytes} bytes")


def test_header_over_the_bound() -> None:
    body = by_hand(json.dumps({"embeddings": entry(0, 192, 1, 48)}).encode() + b" " * 70_000, 192)
    claimed = int.from_bytes(body[:8], "little")
    refused_native(body, f"the safetensors header must be <= 65536 bytes, it claims {claimed}")
    refused_native((2**63).to_bytes(8, "little") + body[8:], f"must be <= 65536 bytes, it claims {2**63}")


def test_header_of_100000_entries_is_refused_at_once() -> None:
    empty = {f"layers.{i}.key": entry(0, 0, 0) for i in range(100_000)}
    body = by_hand(empty | {"embeddings": entry(0, 192, 1, 48)}, 192)
    started = time.process_time()
    refused_native(body, "the safetensors header must be <= 65536 bytes, it claims ")
    refused_peft(config("PROMPT_TUNING"), body, "the safetensors header must be <= 65536 bytes, it claims ")
    assert time.process_time() - started < 0.05


def test_cut_off_anywhere() -> None:
    body = native(kv())
    header = int.from_bytes(body[:8], "little")
    refused_native(body[: 8 + header - 5], f"the file is cut off: its header claims {header} bytes, {header - 5} are")
    needed = len(body) - 8 - header
    refused_native(body[:-1], f"the file is cut off: its tensors need {needed} bytes, {needed - 1} are there")


@pytest.mark.parametrize("more", [1, 8, 4096])
def test_trailing_bytes(more: int) -> None:
    refused_native(native(kv()) + bytes(more), f"the file has {more} trailing bytes after its last tensor")


def test_overlapping_offsets() -> None:
    header = {"__metadata__": KV, "layers.0.key": entry(0, 64, 2, 1, 8), "layers.0.value": entry(32, 96, 2, 1, 8)}
    refused_native(by_hand(header, 96), "'layers.0.value': expected data from byte 64, got 32")
    header["layers.0.value"] = entry(0, 64, 2, 1, 8)
    refused_native(by_hand(header, 64), "expected data from byte 64, got 0")


def test_hole_between_tensors() -> None:
    header = {"__metadata__": KV, "layers.0.key": entry(0, 64, 2, 1, 8), "layers.0.value": entry(68, 132, 2, 1, 8)}
    refused_native(by_hand(header, 132), "'layers.0.value': expected data from byte 64, got 68")
    header = {"__metadata__": SOFT, "embeddings": entry(8, 200, 1, 48)}
    refused_native(by_hand(header, 200), "'embeddings': expected data from byte 0, got 8")


def test_offsets_that_do_not_fit_the_shape() -> None:
    header = {"__metadata__": SOFT, "embeddings": entry(0, 191, 1, 48)}
    refused_native(by_hand(header, 191), "'embeddings': F32 [1, 48] takes 192 bytes, its offsets 191")
    header = {"__metadata__": SOFT, "embeddings": entry(192, 0, 1, 48)}
    refused_native(by_hand(header, 192), "'embeddings': F32 [1, 48] takes 192 bytes, its offsets -192")


@pytest.mark.parametrize("shape", [[0, 48], [2**40, 0], [], [1, 1, 1, 1, 48], [-1, 48], [1.0, 48], [True, 48], "48"])
def test_shape_of_no_tensor(shape: object) -> None:
    header = {"__metadata__": SOFT, "embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    refused_native(by_hand(header, 0), f"'embeddings': expected 1 to 4 dimensions of at least 1, got {shape!r}")


@pytest.mark.parametrize("offsets", [[0], [0, 1, 2], [-1, 191], [0, 192.0], [0, 2**48], "0", None])
def test_offsets_that_are_none(offsets: object) -> None:
    header = {"__metadata__": SOFT, "embeddings": {"dtype": "F32", "shape": [1, 48], "data_offsets": offsets}}
    refused_native(by_hand(header, 192), f"'embeddings': data_offsets must be two numbers, got {offsets!r}")


@pytest.mark.parametrize("found", [7, [], {}, {"dtype": "F32", "shape": [1]}, entry(0, 4, 1) | {"more": 1}])
def test_entry_of_no_tensor(found: object) -> None:
    refused_native(by_hand({"embeddings": found}, 4), "'embeddings': expected dtype, shape and data_offsets")


def test_file_without_tensors() -> None:
    refused_native(by_hand({"__metadata__": KV}, 0), "the file has no tensors")


def test_duplicate_keys() -> None:
    one = json.dumps(entry(0, 192, 1, 48))
    twice = f'{{"__metadata__": {json.dumps(SOFT)}, "embeddings": {one}, "embeddings": {one}}}'
    refused_native(by_hand(twice.encode(), 192), "the safetensors header: duplicate key 'embeddings'")
    nested = f'{{"embeddings": {{"dtype": "F32", "dtype": "F64", {one[1:]}}}'
    refused_native(by_hand(nested.encode(), 192), "the safetensors header: duplicate key 'dtype'")
    metadata = f'{{"__metadata__": {{"kind": "kv", "kind": "soft"}}, "embeddings": {one}}}'
    refused_native(by_hand(metadata.encode(), 192), "the safetensors header: duplicate key 'kind'")
    many = ", ".join(f'"layers.{i % 99}.key": 0' for i in range(100))
    refused_native(by_hand(f"{{{many}}}".encode(), 0), "the safetensors header: duplicate keys")


def test_duplicate_keys_in_the_config() -> None:
    refused_peft(b'{"peft_type": "LORA", "peft_type": "CPT"}', PROMPT, "adapter_config.json: duplicate key 'peft_type'")
    nested = b'{"peft_type": "CPT", "auto_mapping": [{"a": 1, "a": 2}]}'
    refused_peft(nested, PROMPT, "adapter_config.json: duplicate key 'a'")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"nonsense", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe{}"])
def test_json_that_is_no_object(text: bytes) -> None:
    refused_native(by_hand(text, 0), "the safetensors header")
    refused_peft(text, PROMPT, "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": \xff}', "is not valid JSON: byte 6 is not UTF-8"),
        (b'{"a": 1,\n "b" 2}', "is not valid JSON: line 2, column 6"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON: a number has too many digits"),
        (b'{"a": ' + b"[" * 20_000, "is not valid JSON: it nests too deeply"),
        (b'{"' + b"k" * 200 + b'": 1, "' + b"k" * 200 + b'": 1}', f": duplicate key '{'k' * 60}'"),
        (b"null", "must be a JSON object, got null"),
        (b"[1]", "must be a JSON object, got a list"),
        (b'"text"', "must be a JSON object, got 'text'"),
        (b"true", "must be a JSON object, got true"),
    ],
)
def test_reason_of_wrong_json_is_in_our_own_words(text: bytes, reason: str) -> None:
    refused_native(by_hand(text, 0), "the safetensors header", reason)
    refused_peft(text, PROMPT, "adapter_config.json", reason)


@pytest.mark.parametrize("value", [None, True, 1.5, 10**4000, "x\n\u202e", "y" * 500, LONE, ["z"], {"z": None}])
@pytest.mark.parametrize("name", ["peft_type", "task_type", "num_virtual_tokens", "token_dim", "modules_to_save"])
def test_reason_names_a_value_as_json_on_one_short_line(name: str, value: object) -> None:
    for fields, tensors in ((config("PROMPT_TUNING"), PROMPT), (prefix_config(), PREFIX)):
        try:
            read_peft(json.dumps(fields | {name: value}).encode(), safetensors.torch.save(tensors), SHAPE)
        except InvalidArtefactError as error:
            reason = str(error)
            assert reason.isprintable()
            assert len(reason) < 300
            assert not any(word in reason for word in ("None", "True", "NoneType", "torch.", "Error"))
            reason.encode()
        else:
            assert value is None


def test_config_over_the_bound() -> None:
    refused_peft(b"{" + b" " * 70_000 + b"}", PROMPT, "adapter_config.json must be <= 65536 bytes, got 70002")


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "layers.0.key/../x", "C:\\layers.0.key", "", "LAYERS.0.KEY"),
        *("layers.00.key", "layers.-1.key", "layers.1e3.key", "layers.999999.key", "layers.\u0663.key"),
        *("layers.0.keys", "layers.0.key\n", " layers.0.key", "layers.0.key\0", "decoder.layers.0.key"),
    ],
)
def test_name_that_is_no_layers(name: str) -> None:
    expected = "a KV prefix has layers.N.key and layers.N.value only (N from 0 to 2); got "
    refused_native(native(kv() | {name: random(HEADS, N, DIM)}), expected, repr(name))
    refused_native(native({"embeddings": random(N, HIDDEN), name: random(N, HIDDEN)}), "a soft prompt has one tensor")


def test_tensors_of_the_other_kind() -> None:
    refused_native(native({"embeddings": random(N, HIDDEN)}, KV), "a KV prefix has layers.N.key", "got 'embeddings'")
    refused_native(native(kv(), SOFT), "a soft prompt has one tensor, embeddings; got 'layers.0.key'", "and 2 more")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "__metadata__.format must be 'prefixserve/1', got none"),
        (KV | {"format": "pt"}, "__metadata__.format must be 'prefixserve/1', got 'pt'"),
        (KV | {"kind": "lora"}, "__metadata__.kind must be 'kv' or 'soft', got 'lora'"),
        (KV | {"code": "x"}, "__metadata__ has 'code'; known are base_model, fingerprint, format, kind"),
        (KV | {"base_model": "x" * 501}, "__metadata__.base_model must be <= 500 printable characters"),
    ],
)
def test_metadata(metadata: dict[str, str], text: str) -> None:
    refused_native(native(kv(), metadata), text)


@pytest.mark.parametrize("metadata", [None, [], "text", {"format": 1}])
def test_metadata_that_is_no_object_of_strings(metadata: object) -> None:
    body = by_hand({"__metadata__": metadata, "embeddings": entry(0, 192, 1, 48)}, 192)
    refused_native(body, "__metadata__ must be an object of strings")


# PEFT's two files.


def other_types() -> list[str]:
    return sorted({str(kind.value) for kind in peft.PeftType} - PREFIX_TYPES)


@pytest.mark.parametrize("kind", [*other_types(), "lora", "", None, 7, ["PROMPT_TUNING"], {}])
def test_any_other_adapter(kind: object) -> None:
    texts = ("peft_type must be one of PROMPT_TUNING, P_TUNING, CPT", "it cannot be expressed as a prefix")
    refused_peft({"peft_type": kind, "task_type": "CAUSAL_LM"}, PROMPT, *texts, f"got {shown(kind)}")


def test_other_adapters_are_many() -> None:
    assert {"LORA", "ADAPTION_PROMPT", "IA3"} <= set(other_types())
    assert len(other_types()) > 20


@pytest.mark.parametrize("modules", [["lm_head"], ["classifier", "score"], "lm_head", {"a": 1}])
def test_modules_to_save(modules: object) -> None:
    refused_peft(config("PROMPT_TUNING", modules_to_save=modules), PROMPT, "modules_to_save must be empty, got ")


@pytest.mark.parametrize(
    "more",
    [
        {"trust_remote_code": True},
        {"trust_remote_code": "yes"},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
        {"a": [[{"b": {"c": [0, {"trust_remote_code": 1}]}}]]},
        {"trust_remote_code": False, "auto_mapping": {"trust_remote_code": True}},
    ],
)
def test_remote_code_anywhere(more: dict[str, object]) -> None:
    refused_peft(config("PROMPT_TUNING", **more), PROMPT, "trust_remote_code must be false everywhere, got true")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_task_without_text_as_its_answer(task: str) -> None:
    text = f"task_type must be CAUSAL_LM, got {task!r}: answers are text here; train it as CAUSAL_LM, with the label as"
    refused_peft(config("PROMPT_TUNING", task_type=task), PROMPT, text)


@pytest.mark.parametrize("kind", sorted(PREFIX_TYPES))
def test_file_that_names_no_task_is_answered_without_its_prefix_by_peft(kind: str) -> None:
    text = "task_type must be CAUSAL_LM, got null: without it PEFT answers as if there were no prefix"
    refused_peft(config(kind, task_type=None), PROMPT, text)
    fields = config(kind)
    del fields["task_type"]
    refused_peft(fields, PROMPT, text)


def test_task_of_an_encoder_decoder_or_unknown() -> None:
    text = "task_type must be CAUSAL_LM, got 'SEQ_2_SEQ_LM': the served model is decoder-only"
    refused_peft(config("PROMPT_TUNING", task_type="SEQ_2_SEQ_LM"), PROMPT, text)
    refused_peft(config("PROMPT_TUNING", task_type="DANCING"), PROMPT, "must be CAUSAL_LM, got 'DANCING'")


def test_base_model_that_is_no_name() -> None:
    text = "base_model_name_or_path must be a text of at most 500 printable characters"
    refused_peft(config("PROMPT_TUNING", base_model_name_or_path="x" * 501), PROMPT, text)
    refused_peft(config("PROMPT_TUNING", base_model_name_or_path=["a/b"]), PROMPT, text)


def test_file_without_grouped_heads() -> None:
    # as for a model whose attention heads each had their own keys and values
    wide = 2 * LAYERS * 6 * DIM
    fields = prefix_config(num_attention_heads=6, token_dim=6 * DIM)
    refused_peft(
        fields,
        {"prompt_embeddings": random(N, wide)},
        f"prompt_embeddings: width must be {WIDTH} (2 * 3 layers * 2 KV heads * 8), got {wide}",
        "a file without the model's grouped heads cannot be served",
    )


def test_other_heads_of_the_same_width() -> None:
    refused_peft(prefix_config(num_attention_heads=4), PREFIX, "num_attention_heads must be 2 (of the model's KV")
    refused_peft(prefix_config(token_dim=HIDDEN), PREFIX, "token_dim must be 16 (of the model's KV heads), got 48")


def test_other_number_of_layers() -> None:
    refused_peft(prefix_config(num_layers=4), PREFIX, "num_layers must be 3, got 4")
    four = {"prompt_embeddings": random(N, WIDTH // 3 * 4)}
    refused_peft(prefix_config(num_layers=3), four, f"width must be {WIDTH} (2 * 3 layers", "got 128")


HUGE = 10**4000
WRONG_SIZES: list[object] = [0, -3, True, False, "3", 3.0, [3], {}, "", 1e300]
WITH_HUGE = [*WRONG_SIZES, pytest.param(HUGE, id="huge")]


@pytest.mark.parametrize("value", WITH_HUGE)
def test_size_that_is_not_the_tensors(value: object) -> None:
    for name, expected in (("num_layers", 3), ("num_attention_heads", 2), ("token_dim", 16)):
        for kind in ("PREFIX_TUNING", "CARTRIDGE"):
            fields = prefix_config(peft_type=kind) | {name: value}
            refused_peft(fields, PREFIX, f"{name} must be {expected}", f"got {shown(value)}")
    for kind in ("PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"):
        tensors = PROMPT if kind != "MULTITASK_PROMPT_TUNING" else multitask(random(1, N, 1), random(1, 1, HIDDEN))
        refused_peft(config(kind, token_dim=value), tensors, f"token_dim must be 48, got {shown(value)}")


@pytest.mark.parametrize("value", [*WITH_HUGE, 3, 512])
def test_ranks_and_tasks_that_are_not_the_tensors(value: object) -> None:
    tensors = multitask(random(2, N, 4), random(2, 4, HIDDEN))
    for name, expected in (("num_tasks", 2), ("num_ranks", 4)):
        fields = config("MULTITASK_PROMPT_TUNING", **{name: value})
        refused_peft(fields, tensors, f"{name} must be {expected}, got {shown(value)}")


@pytest.mark.parametrize("kind", sorted(PREFIX_TYPES))
@pytest.mark.parametrize("value", [*WITH_HUGE, 2, 3])
def test_other_number_of_stacks_on_a_decoder(kind: str, value: object) -> None:
    """With 2 PEFT lays GPT-2's keys out as an encoder-decoder's, and hides as much text as a soft prompt is longer."""
    is_kv = kind in ("PREFIX_TUNING", "CARTRIDGE")
    fields = (prefix_config(peft_type=kind) if is_kv else config(kind)) | {"num_transformer_submodules": value}
    for tensor in (PREFIX if is_kv else PROMPT)["prompt_embeddings"], random(2 * N, HIDDEN):
        tensors = {"prompt_embeddings": tensor}
        if kind == "MULTITASK_PROMPT_TUNING":
            tensors |= multitask(random(1, len(tensor), 1), random(1, 1, HIDDEN)) | tensors
        text = f"num_transformer_submodules must be 1 for {kind} of a decoder-only model, got {shown(value)}: "
        refused_peft(fields, tensors, text, "train it without this field")


@pytest.mark.parametrize("ids", [[5], [5] * (N + 1), [], "four", 4, {"5": 5}])
def test_token_ids_of_cpt_that_are_not_as_many_as_its_rows(ids: object) -> None:
    refused_peft(config("CPT", cpt_token_ids=ids), PROMPT, "cpt_token_ids must be a list of 4, as many as rows, got ")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "CPT"])
def test_peft_soft_prompt_of_another_shape(kind: str) -> None:
    wide = {"prompt_embeddings": random(N, HIDDEN + 1)}
    refused_peft(config(kind), wide, "prompt_embeddings: width must be 48, got 49")
    flat = {"prompt_embeddings": random(N * HIDDEN)}
    refused_peft(config(kind), flat, f"prompt_embeddings: expected 2 dimensions, got [{N * HIDDEN}]")
    more = {"prompt_embeddings": random(2 * N, HIDDEN)}
    refused_peft(config(kind), more, "prompt_embeddings: num_virtual_tokens is 4, the tensor has 8 rows")


@pytest.mark.parametrize("count", [5, True, "4", 4.0, [4]])
def test_num_virtual_tokens_that_is_not_the_files(count: object) -> None:
    fields = config("PROMPT_TUNING", num_virtual_tokens=count)
    refused_peft(fields, PROMPT, f"num_virtual_tokens is {shown(count)}, the tensor has 4 rows")


def test_peft_file_longer_than_the_limit() -> None:
    long = {"prompt_embeddings": random(65, HIDDEN)}
    refused_peft(config("PROMPT_TUNING", num_virtual_tokens=65), long, "num_virtual_tokens must be 1 to 64, got 65")


def test_peft_tensors_of_other_names() -> None:
    lora = {"base_model.model.layers.0.q_proj.lora_A.weight": random(4, HIDDEN)}
    refused_peft(config("PROMPT_TUNING"), lora, "PROMPT_TUNING has the tensors prompt_embeddings; got 'base_model.")
    refused_peft(config("CPT"), PROMPT | {"../x": random(1)}, "CPT has the tensors prompt_embeddings; got '../x'")
    expected = "has the tensors prefix_task_cols, prefix_task_rows, prompt_embeddings; got 'prompt_embeddings'"
    refused_peft(config("MULTITASK_PROMPT_TUNING"), PROMPT, expected)


def test_peft_values_and_dtype() -> None:
    wrong = {"prompt_embeddings": random(N, HIDDEN)}
    wrong["prompt_embeddings"][1, 1] = float("nan")
    refused_peft(config("PROMPT_TUNING"), wrong, "prompt_embeddings: all values must be finite, got NaN or infinity")
    wrong["prompt_embeddings"][1, 1] = 1e5
    refused_peft(config("PROMPT_TUNING"), wrong, "prompt_embeddings: magnitudes must be <= 65504, got 100000")
    wrong = {"prompt_embeddings": torch.ones(N, HIDDEN, dtype=torch.int64)}
    refused_peft(config("PROMPT_TUNING"), wrong, "'prompt_embeddings': dtype must be floating", "got 'I64'")


def multitask(cols: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return PROMPT | {"prefix_task_cols": cols, "prefix_task_rows": rows}


def test_multitask_file() -> None:
    fields = config("MULTITASK_PROMPT_TUNING")
    two = multitask(random(2, N, 1), random(2, 1, HIDDEN))
    refused_peft(fields, two, "index must be 0 to 1 for this multitask file, got none")
    refused_peft(fields, multitask(random(2, N), random(2, 1, HIDDEN)), "prefix_task_cols: expected 3 dimensions")
    refused_peft(fields, multitask(random(2, N, 1), random(3, 1, HIDDEN)), "do not fit each other", "[3, 1, 48]")
    large = multitask(torch.full((1, N, 1), 60_000.0), torch.full((1, 1, HIDDEN), 60_000.0))
    refused_peft(fields, large, "embeddings: magnitudes must be <= 65504, got ")
    for index in (-1, 2):
        with pytest.raises(InvalidArtefactError, match=f"index must be 0 to 1 for this multitask file, got {index}"):
            read_peft(json.dumps(fields).encode(), safetensors.torch.save(two), SHAPE, index)


def test_index_of_a_file_with_one_task() -> None:
    body, weights = json.dumps(config("CPT")).encode(), safetensors.torch.save(PROMPT)
    with pytest.raises(InvalidArtefactError, match="index picks a task of a MULTITASK_PROMPT_TUNING file, this is CPT"):
        read_peft(body, weights, SHAPE, 0)


# The canonical file.


def canonical(num_header_bytes: int) -> bytes:
    """A right file whose header has this length: its first two bytes are those of other formats."""
    header = json.dumps({"__metadata__": SOFT, "embeddings": entry(0, 192, 1, 48)}).encode()
    return by_hand(header.ljust(num_header_bytes), 192)


def test_canonical_file_passes_its_own_gate() -> None:
    for num_tokens in range(1, 40):
        pair = (random(HEADS, num_tokens, DIM), random(HEADS, num_tokens, DIM))
        body = write_native(Prefix("kv", layers={1: pair}, base_model="tiny", fingerprint="f" * 64))
        assert set(read_header(body).tensors) == {"layers.1.key", "layers.1.value"}
        assert read_native(body, SHAPE).num_virtual_tokens == num_tokens


@pytest.mark.parametrize("num_header_bytes", [640, 896, 1152, 1408, 19280])
def test_header_length_that_looks_like_a_pickle_or_zip_is_taken(num_header_bytes: int) -> None:
    assert canonical(num_header_bytes)[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
    assert read_native(canonical(num_header_bytes), SHAPE).num_virtual_tokens == 1


# Stranger ones.


@pytest.mark.parametrize("depth", [450, 800])
def test_remote_code_in_a_deeply_nested_config(depth: int) -> None:
    inner = b'{"trust_remote_code": true}'
    nested = b'{"peft_type": "PROMPT_TUNING", "a": ' + b"[" * depth + inner + b"]" * depth + b"}"
    refused_peft(nested, PROMPT, "trust_remote_code must be false everywhere, got true")
    safe = json.dumps(config("PROMPT_TUNING", a=0)).encode().replace(b'"a": 0', b'"a": ' + b"[" * depth + b"]" * depth)
    assert read_peft(safe, safetensors.torch.save(PROMPT), SHAPE).num_virtual_tokens == N


def test_header_that_only_safetensors_refuses() -> None:
    header = json.dumps({"__metadata__": SOFT, "embeddings": entry(0, 192, 1, 48)})
    minus = header.replace("[0, 192]", "[-0, 192]").encode()
    assert minus != header.encode()
    refused_native(by_hand(minus, 192), "safetensors does not read the file: ")
    named = {"__metadata__": {"format": "\ud800"}, "prompt_embeddings": entry(0, 4 * N * HIDDEN, N, HIDDEN)}
    refused_peft(config("PROMPT_TUNING"), by_hand(named, 4 * N * HIDDEN), "safetensors does not read the file: ")


@pytest.mark.parametrize("key", ["base_model", "fingerprint"])
@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\0"])
def test_base_model_that_cannot_be_shown(key: str, text: str) -> None:
    body = by_hand({"__metadata__": SOFT | {key: text}, "embeddings": entry(0, 192, 1, 48)}, 192)
    refused_native(body, f"__metadata__.{key} must be printable text on one line")
    fields = config("PROMPT_TUNING", base_model_name_or_path=text)
    refused_peft(fields, PROMPT, "base_model_name_or_path must be printable text on one line")


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float8_e5m2, torch.float16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_multitask_file_of_any_dtype_is_multiplied_in_single(dtypes: tuple[torch.dtype, ...]) -> None:
    tensors = [t.to(d) for t, d in zip((random(N, HIDDEN), random(2, N, 2), random(2, 2, HIDDEN)), dtypes, strict=True)]
    table, cols, rows = (tensor.float() for tensor in tensors)
    names = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    body = safetensors.torch.save(dict(zip(names, tensors, strict=True)))
    found = read_peft(json.dumps(config("MULTITASK_PROMPT_TUNING")).encode(), body, SHAPE, 1).embeddings
    assert found is not None
    assert found.dtype == torch.float32
    for token in range(N):
        for place in range(HIDDEN):
            factor = sum(float(cols[1, token, r]) * float(rows[1, r, place]) for r in range(2))
            assert float(found[token, place]) == pytest.approx(float(table[token, place]) * factor, abs=1e-5)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_double_precision_of_a_peft_file_goes_through_single(model_dtype: torch.dtype) -> None:
    """As in PEFT, whose own parameters are in single precision: from there a narrower dtype may round otherwise."""
    shape = replace(SHAPE, dtype=model_dtype)
    halfway = 1 + 2.0**-9 + 2.0**-40  # to bf16 directly it rounds up, through single precision down
    for fields, tensor in ((config("PROMPT_TUNING"), PROMPT), (prefix_config(), PREFIX)):
        exact = torch.full_like(tensor["prompt_embeddings"], halfway, dtype=torch.float64)
        found = read_peft(json.dumps(fields).encode(), safetensors.torch.save({"prompt_embeddings": exact}), shape)
        loaded = found.embeddings if found.embeddings is not None else found.layers[0][0]
        assert torch.equal(loaded.to(model_dtype), torch.full_like(loaded, halfway).float().to(model_dtype))
        assert loaded.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_float8_is_taken(dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=model_dtype)
    prefix = read_native(native({name: tensor.to(dtype) for name, tensor in kv().items()}), shape)
    assert prefix.layers[2][1].dtype == dtype
    fields, table = json.dumps(prefix_config()).encode(), PREFIX["prompt_embeddings"].to(dtype)
    found = read_peft(fields, safetensors.torch.save({"prompt_embeddings": table}), shape)
    assert torch.equal(found.layers[1][0][1, 3].float(), table[3].float().view(2 * LAYERS, HEADS, DIM)[2, 1])


def test_value_that_the_models_dtype_cannot_hold() -> None:
    body = native({"embeddings": torch.full((N, HIDDEN), 65_504.0)})
    text = "embeddings: all values must stay finite as torch.float8_e5m2, 65504 does not"
    refused_native(body, text, shape=replace(SHAPE, dtype=torch.float8_e5m2))


@pytest.mark.parametrize("sizes", [(0, HIDDEN), (N, 0)])
def test_empty_embeddings(sizes: tuple[int, int]) -> None:
    prefix = Prefix("soft", embeddings=torch.zeros(sizes))
    shape = replace(SHAPE, hidden_size=sizes[1])
    text = rf"embeddings: expected 2 dimensions \[num_virtual_tokens, hidden_size\] of at least 1, got \[{sizes[0]}, "
    with pytest.raises(InvalidArtefactError, match=text):
        validate(prefix, shape)


def test_empty_layer() -> None:
    empty = torch.zeros(HEADS, 0, DIM)
    with pytest.raises(
        InvalidArtefactError, match=r"layers.0.key: expected 3 dimensions .* of at least 1, got \[2, 0, 8"
    ):
        validate(Prefix("kv", layers={0: (empty, empty)}), SHAPE)


@pytest.mark.parametrize(
    "header",
    [
        {LONE: 1},
        {LONE: entry(0, 4, 1, dtype="I32")},
        {LONE: entry(0, 4, 1, dtype=LONE)},
        {LONE: entry(0, 4, 1) | {"shape": LONE}},
        {LONE: entry(0, 4, 1) | {"data_offsets": [LONE]}},
        {LONE: entry(4, 8, 1)},
        {LONE: entry(0, 3, 1)},
        {"__metadata__": KV, LONE: entry(0, 4, 1)},
        {"__metadata__": SOFT, LONE: entry(0, 4, 1)},
        {"__metadata__": {"format": LONE}, "a": entry(0, 4, 1)},
        {"__metadata__": KV | {"kind": LONE}, "a": entry(0, 4, 1)},
        {"__metadata__": KV | {LONE: ""}, "a": entry(0, 4, 1)},
        {"__metadata__": KV | {"separator": LONE}, "a": entry(0, 4, 1)},
        {"__metadata__": SOFT | {"placement": LONE}, "embeddings": entry(0, 192, 1, 48)},
    ],
)
def test_reason_can_be_sent(header: dict[str, Any]) -> None:
    size = max(e["data_offsets"][-1] if isinstance(e, dict) and "shape" in e else 0 for e in header.values())
    with pytest.raises(InvalidArtefactError) as caught:
        read_native(by_hand(header, size if isinstance(size, int) else 4), SHAPE)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    "more",
    [
        {"peft_type": LONE},
        {"peft_type": [LONE]},
        {"task_type": LONE},
        {"modules_to_save": LONE},
        {"num_virtual_tokens": LONE},
        {"base_model_name_or_path": LONE},
        {"a": {LONE: 1}, LONE: 1, "peft_type": "x"},
    ],
)
def test_reason_of_a_config_can_be_sent(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidArtefactError) as caught:
        read_peft(json.dumps(config("PROMPT_TUNING") | more).encode(), safetensors.torch.save(PROMPT), SHAPE)
    str(caught.value).encode("utf-8")


# Encoder-decoders.

SEQ2SEQ = replace(SHAPE, num_encoder_layers=2)


def seq2seq(*parts: str) -> dict[str, torch.Tensor]:
    layers = {"decoder": LAYERS, "cross": LAYERS, "encoder": 2}
    return {f"{part}.{name}": tensor for part in parts for name, tensor in kv(layers[part]).items()}


def test_encoder_decoder_takes_each_part() -> None:
    for parts in (("encoder",), ("decoder",), ("cross",), ("encoder", "decoder", "cross")):
        found = read_native(native(seq2seq(*parts)), SEQ2SEQ)
        assert {part for part, _ in found.parts()} == set(parts)
        assert found.is_seq2seq
    assert read_native(native({"encoder.embeddings": random(N, HIDDEN)}, SOFT), SEQ2SEQ).layout.num_encoder_tokens == N


def test_artefact_of_the_other_architecture() -> None:
    for body in (native(kv()), native({"embeddings": random(N, HIDDEN)})):
        text = "expected a prefix for an encoder-decoder (tiny), got one for a decoder-only model"
        refused_native(body, text, shape=SEQ2SEQ)
    for body in (native(seq2seq("encoder")), native({"encoder.embeddings": random(N, HIDDEN)}, SOFT)):
        refused_native(body, "expected a prefix for a decoder-only model (tiny), got one for an encoder-decoder")
    fields = json.dumps(config("PROMPT_TUNING")).encode()
    text = "task_type must be SEQ_2_SEQ_LM, got 'CAUSAL_LM': the served model is an encoder-decoder"
    with pytest.raises(InvalidArtefactError, match=text):
        read_peft(fields, safetensors.torch.save(PROMPT), SEQ2SEQ)


def test_names_and_layers_of_an_encoder_decoder() -> None:
    expected = "a KV prefix has (encoder|decoder|cross).layers.N.key and (encoder|decoder|cross).layers.N.value only"
    for name in ("layers.0.key", "encoder.layers.00.key", "middle.layers.0.key", "encoder.embeddings"):
        body = native(seq2seq("decoder") | {name: random(HEADS, N, DIM)})
        refused_native(body, expected, repr(name), shape=SEQ2SEQ)
    body = native({"decoder.embeddings": random(N, HIDDEN)}, SOFT)
    text = "a soft prompt has one tensor, encoder.embeddings; got 'decoder.embeddings'"
    refused_native(body, text, shape=SEQ2SEQ)
    more = {f"encoder.layers.2.{which}": random(HEADS, N, DIM) for which in ("key", "value")}
    text = "encoder.layers.2: the model has 2 layers (0 to the last)"
    refused_native(native(seq2seq("encoder") | more), text, shape=SEQ2SEQ)
    longer = {f"cross.layers.0.{which}": random(HEADS, 65, DIM) for which in ("key", "value")}
    refused_native(native(longer, KV), "num_virtual_tokens must be 1 to 64, got 65", shape=SEQ2SEQ)
    body = native(seq2seq("decoder"), KV | {"placement": "infix", "separator": "4"})
    refused_native(body, "an infix needs a decoder-only model", shape=SEQ2SEQ)


def test_peft_soft_prompt_of_an_encoder_decoder_has_rows_for_both_stacks() -> None:
    fields = json.dumps(config("PROMPT_TUNING", task_type="SEQ_2_SEQ_LM")).encode()
    table = random(2 * N, HIDDEN)
    found = read_peft(fields, safetensors.torch.save({"prompt_embeddings": table}), SEQ2SEQ)
    assert found.embeddings is not None
    assert torch.equal(found.embeddings, table[:N])
    refused_seq2seq(json.loads(fields), PROMPT, "num_virtual_tokens is 4 for each of 2 stacks, the tensor has 4 rows")


def refused_seq2seq(fields: dict[str, Any], tensors: dict[str, torch.Tensor], *texts: str) -> None:
    with pytest.raises(InvalidArtefactError) as caught:
        read_peft(json.dumps(fields).encode(), safetensors.torch.save(tensors), SEQ2SEQ)
    for text in texts:
        assert text in str(caught.value)


SOFT_OF_BOTH = sorted(PREFIX_TYPES - {"PREFIX_TUNING", "CARTRIDGE", "CPT"})


@pytest.mark.parametrize("kind", SOFT_OF_BOTH)
@pytest.mark.parametrize("num_stacks", [1, 2, 3, None])
def test_peft_soft_prompt_of_an_encoder_decoder_has_rows_for_as_many_stacks_as_it_says(
    kind: str, num_stacks: int | None
) -> None:
    """PEFT takes the first n for the encoder, whatever follows."""
    count = num_stacks or 2
    fields = config(kind, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=num_stacks)
    tensors = {"prompt_embeddings": random(count * N, HIDDEN)}
    if kind == "MULTITASK_PROMPT_TUNING":
        tensors |= {"prefix_task_cols": torch.ones(1, count * N, 1), "prefix_task_rows": torch.ones(1, 1, HIDDEN)}
    found = read_peft(json.dumps(fields).encode(), safetensors.torch.save(tensors), SEQ2SEQ)
    assert found.embeddings is not None
    assert torch.equal(found.embeddings, tensors["prompt_embeddings"][:N])
    fields["num_transformer_submodules"] = count + 1
    refused_seq2seq(
        fields, tensors, f"num_virtual_tokens is 4 for each of {count + 1} stacks, the tensor has {count * N}"
    )


@pytest.mark.parametrize("kind", SOFT_OF_BOTH)
@pytest.mark.parametrize("value", WRONG_SIZES)
def test_number_of_stacks_that_is_none(kind: str, value: object) -> None:
    fields = config(kind, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=value)
    tensors = multitask(random(1, N, 1), random(1, 1, HIDDEN)) if kind == "MULTITASK_PROMPT_TUNING" else PROMPT
    refused_seq2seq(fields, tensors, f"num_transformer_submodules must be at least 1 for {kind} of an encoder-decoder")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("value", [*WITH_HUGE, 1, 3, 4])
def test_keys_of_an_encoder_decoder_that_peft_lays_out_otherwise(kind: str, value: object) -> None:
    """With 1 PEFT keeps what the decoder and its cross-attention have seen in one growing cache; from 3 it fails."""
    fields = prefix_config(peft_type=kind, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=value)
    text = f"num_transformer_submodules must be 2 for {kind} of an encoder-decoder, got {shown(value)}: "
    refused_seq2seq(fields, PREFIX, text, "train it without this field")


def test_cpt_of_an_encoder_decoder() -> None:
    text = "peft_type CPT is for decoder-only models in PEFT, the served model is none"
    refused_seq2seq(config("CPT", task_type="SEQ_2_SEQ_LM"), {"prompt_embeddings": random(2 * N, HIDDEN)}, text)


@pytest.mark.parametrize("num_layers", [LAYERS, LAYERS + 1, 7])
def test_keys_of_an_encoder_decoder_are_read_by_the_depth_that_the_file_names(num_layers: int) -> None:
    fields = prefix_config(task_type="SEQ_2_SEQ_LM", num_layers=num_layers)
    table = random(N, 2 * num_layers * HEADS * DIM)
    found = read_peft(json.dumps(fields).encode(), safetensors.torch.save({"prompt_embeddings": table}), SEQ2SEQ)
    slots = table.view(N, 2 * num_layers, HEADS, DIM).transpose(1, 2)  # [n, heads, slots, dim]
    assert sorted(found.layers) == list(range(LAYERS))
    for layer, (key, value) in found.layers.items():
        assert torch.equal(key.transpose(0, 1), slots[:, :, 4 * layer % (2 * num_layers)])
        assert torch.equal(value.transpose(0, 1), slots[:, :, (4 * layer + 1) % (2 * num_layers)])
    refused_seq2seq(fields, PREFIX | {"prompt_embeddings": table[:, 1:].contiguous()}, "prompt_embeddings: width must")


@pytest.mark.parametrize("num_layers", [*WITH_HUGE, 1, 2, None, 5000])
def test_keys_of_an_encoder_decoder_for_too_few_layers_or_none_that_can_be(num_layers: object) -> None:
    """None is the encoder's depth in PEFT, which is 2 here, and the decoder has 3."""
    found = shown(2 if num_layers is None else num_layers)
    text = f"num_layers must be 3 (the decoder's layers) to 4096, got {found}: with fewer PEFT fails"
    refused_seq2seq(prefix_config(task_type="SEQ_2_SEQ_LM", num_layers=num_layers), PREFIX, text, "with num_layers=3")


def test_depth_that_an_encoder_decoders_file_does_not_name_is_the_encoders() -> None:
    deeper = replace(SHAPE, num_encoder_layers=5)
    fields = prefix_config(task_type="SEQ_2_SEQ_LM", num_layers=None)
    table = random(N, 2 * 5 * HEADS * DIM)
    found = read_peft(json.dumps(fields).encode(), safetensors.torch.save({"prompt_embeddings": table}), deeper)
    assert torch.equal(found.layers[2][0][1, 3], table[3].view(10, HEADS, DIM)[8, 1])
