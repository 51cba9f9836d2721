"""Tokenizers that a server cannot start with, and prompts that its model has no embedding for."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from server.engine.errors import ModelRefusedError
from server.errors import StartError
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, serve_in_thread, settings_for
from tests.tokenizer_makes import save_scripted_model, sentencepiece


def start(path: Path, data_dir: Path) -> None:
    make_state(settings_for(data_dir), ModelFiles(path, NAME))


def break_json(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def name_no_class(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))


def need_a_package(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BioGptTokenizer"}))


def remove(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


@pytest.mark.parametrize("spoil", [break_json, name_no_class, need_a_package, remove])
def test_tokenizer_that_cannot_be_loaded_stops_the_start(
    model_path: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = shutil.copytree(model_path, tmp_path / NAME)
    spoil(path)
    with pytest.raises(StartError, match="expected a tokenizer") as caught:
        start(path, tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizers_files_says_which(model_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(model_path, tmp_path / NAME)
    remove(path)
    with pytest.raises(StartError, match=r"found neither tokenizer\.json nor tokenizer_config\.json"):
        start(path, tmp_path / "data")


def test_family_that_makes_an_empty_tokenizer_without_files_stops_the_start(tmp_path: Path) -> None:
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / NAME)
    with pytest.raises(StartError, match="found none"):
        start(tmp_path / NAME, tmp_path / "data")


def test_prompt_with_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = sentencepiece("prepend")
    path = save_scripted_model(tmp_path / NAME, tokenizer, [5, 6])
    size = (len(tokenizer) // 16 + 1) * 16
    tokenizer.add_tokens([f"<added-{i}>" for i in range(size - len(tokenizer) + 1)])
    tokenizer.save_pretrained(path)
    for served in serve_in_thread(make_state(settings_for(tmp_path / "data"), ModelFiles(path, NAME))):
        assert served.generate("the").status_code == 200
        last = tokenizer.convert_ids_to_tokens(size)
        refused = served.generate(f"the {last}")
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
        assert str(size) in refused.json()["error"]
        body = {"model": NAME, "prompt": last}
        assert served.http.post("/v1/completions", json=body).status_code == 400
        assert served.generate("the").status_code == 200


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_is_never_run_whatever_is_answered(
    model_path: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on the terminal whether it may, and runs the code for a `y`."""
    path = shutil.copytree(model_path, tmp_path / NAME)
    ran = tmp_path / "ran"
    (path / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((path / file).read_text())
    named = {"AutoConfig": "code.Own"} if file == "config.json" else {"AutoTokenizer": ["code.Own", None]}
    changed = {"auto_map": named, "model_type": "own", "tokenizer_class": "Own"}
    (path / file).write_text(json.dumps(config | changed))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises((StartError, ModelRefusedError), match="code") as caught:
        start(path, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not ran.exists()
