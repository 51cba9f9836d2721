"""A model's folder with something missing or damaged: one line that names the file, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from server.cli import app
from server.engine.errors import ModelRefusedError
from server.errors import StartError
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, native, settings_for

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(name: str, content: bytes) -> Callable[[Path], str]:
    def spoil(path: Path) -> str:
        (path / name).write_bytes(content)
        return name

    return spoil


def remove(name: str) -> Callable[[Path], str]:
    def spoil(path: Path) -> str:
        (path / name).unlink()
        return name

    return spoil


def cut(share: float) -> Callable[[Path], str]:
    def spoil(path: Path) -> str:
        content = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(content[: int(len(content) * share)])
        return WEIGHTS

    return spoil


def a_byte_too_long(path: Path) -> str:
    with (path / WEIGHTS).open("ab") as file:
        file.write(b"x")
    return WEIGHTS


def a_folder_in_its_place(path: Path) -> str:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()
    return WEIGHTS


def in_shards(path: Path) -> dict[str, str]:
    """Two files and an index."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def shard_missing(path: Path) -> str:
    file = in_shards(path).popitem()[1]
    (path / file).unlink()
    return file


def shard_cut(path: Path) -> str:
    file = in_shards(path).popitem()[1]
    (path / file).write_bytes((path / file).read_bytes()[:-1])
    return file


def index_with_another_tensor(path: Path) -> str:
    files = in_shards(path)
    file = next(iter(files.values()))
    (path / INDEX).write_text(json.dumps({"weight_map": files | {"model.more": file}}))
    return file


def index_outside(path: Path) -> str:
    files = in_shards(path)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(files, "../elsewhere.safetensors")}))
    return INDEX


def index_of_rubbish(path: Path) -> str:
    in_shards(path)
    (path / INDEX).write_text("{")
    return INDEX


HEADER_OF_RUBBISH = (5).to_bytes(8, "little") + b"{[}]x"
SPOILS = {
    "no config": remove("config.json"),
    "empty config": write("config.json", b""),
    "config of rubbish": write("config.json", b"\x00\xff{"),
    "config that is a list": write("config.json", b"[]"),
    "config without a family": write("config.json", b"{}"),
    "tokenizer of rubbish": write("tokenizer.json", b"{"),
    "no weights": remove(WEIGHTS),
    "empty weights": write(WEIGHTS, b""),
    "few bytes of weights": write(WEIGHTS, b"abc"),
    "weights of rubbish": write(WEIGHTS, b"not a safetensors file at all"),
    "header of rubbish": write(WEIGHTS, HEADER_OF_RUBBISH),
    "header without offsets": write(WEIGHTS, (8).to_bytes(8, "little") + b'{"a":{}}'),
    "weights cut in the header": cut(0.02),
    "weights cut in half": cut(0.5),
    "weights a byte short": cut(0.99999),
    "weights a byte too long": a_byte_too_long,
    "a folder for weights": a_folder_in_its_place,
    "a shard missing": shard_missing,
    "a shard cut": shard_cut,
    "an index with a tensor that is not there": index_with_another_tensor,
    "an index that leads out": index_outside,
    "an index of rubbish": index_of_rubbish,
    "generation config of rubbish": write("generation_config.json", b"{"),
}


@pytest.fixture
def folder(model_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_path, tmp_path / NAME)


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_damage_is_one_line_that_names_the_file(folder: Path, spoil: Callable[[Path], str], tmp_path: Path) -> None:
    name = spoil(folder)
    with pytest.raises((StartError, ModelRefusedError)) as caught:
        make_state(settings_for(tmp_path / "data"), ModelFiles(folder, NAME))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "one.safetensors").write_bytes(native(1))
    env = {"PREFIXSERVE_DATA_DIR": str(tmp_path / "data")}
    for command in (
        ("inspect", str(tmp_path / "one.safetensors"), "--model", str(folder)),
        ("model", "path", str(folder)),
        ("serve", "--port", "0", "--model", str(folder)),
    ):
        if spoil is SPOILS["config without a family"] and command[0] != "inspect":
            continue  # only transformers knows its families
        result = CliRunner().invoke(app, command, env=env)
        assert (result.exit_code, result.stdout) == (1, ""), (command, result.output)
        assert result.stderr.count("\n") == 1
        assert name in result.stderr


def test_weights_that_lack_a_tensor_are_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    """transformers makes up random numbers in its place, with a warning."""
    tensors = load_file(folder / WEIGHTS)
    name = sorted(name for name in tensors if "mlp" in name)[0]
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelRefusedError, match=name) as caught:
        make_state(settings_for(tmp_path / "data"), ModelFiles(folder, NAME))
    assert "\n" not in str(caught.value)


def test_a_whole_model_in_shards_is_served(folder: Path, tmp_path: Path) -> None:
    in_shards(folder)
    make_state(settings_for(tmp_path / "data"), ModelFiles(folder, NAME)).store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).chmod(0)
    with pytest.raises(StartError, match=f"{WEIGHTS} cannot be read"):
        make_state(settings_for(tmp_path / "data"), ModelFiles(folder, NAME))
