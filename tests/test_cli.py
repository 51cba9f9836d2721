"""The command line as it is: against a real server over HTTP, and on files alone."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import Result
from safetensors.torch import load, save
from transformers import BartConfig, BartForConditionalGeneration
from typer.testing import CliRunner

from prefix_store.prefix import Layout
from server.cli import app
from tests.byte_model import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS
from tests.conftest import NAME, Served, native

ROOT = Path(__file__).parents[1]
PROMPT = "A fine film."


@dataclass(frozen=True)
class Cli:
    """`prefixserve` with a server's URL and a model's folder in its environment."""

    env: dict[str, str]

    def run(self, *arguments: object, **env: str) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=self.env | env)

    def json(self, *arguments: object, exit_code: int = 0) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout)

    def refused(self, *arguments: object, **env: str) -> str:
        """The one line of an expected failure."""
        result = self.run(*arguments, **env)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr


@pytest.fixture(scope="module")
def cli(served: Served, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Nothing of the caller's own environment reaches it."""
    cache, data = (str(tmp_path_factory.mktemp(name)) for name in ("cache", "data"))
    inherited = {name: "" for name in os.environ if name.startswith("PREFIXSERVE_")}
    ours = {"URL": served.url, "MODEL": str(model_path), "MODEL_ALIAS": "mini,owner/mini", "DTYPE": "float32"}
    ours |= {"CACHE_DIR": cache, "DATA_DIR": data}
    return Cli(inherited | {f"PREFIXSERVE_{name}": value for name, value in ours.items()})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of native files and PEFT folders."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "one.safetensors").write_bytes(native(301, 20))
    (folder / "two.safetensors").write_bytes(native(302))
    (folder / "named.safetensors").write_bytes(native(303, base_model="owner/mini"))
    (folder / "other.safetensors").write_bytes(native(304, base_model="someone/else"))
    (folder / "infix.safetensors").write_bytes(native(306, placement="infix", separator=46))
    (folder / "long.safetensors").write_bytes(native(305, 300))
    (folder / "wrong.safetensors").write_bytes(b"not a safetensors file")
    torch.manual_seed(3)
    tensors = {
        "prompt_embeddings": torch.randn(4, HIDDEN),
        "prefix_task_cols": torch.randn(3, 4, 2),
        "prefix_task_rows": torch.randn(3, 2, HIDDEN),
    }
    write_peft(folder / "multitask", "MULTITASK_PROMPT_TUNING", tensors)
    write_peft(folder / "prompt", "PROMPT_TUNING", {"prompt_embeddings": tensors["prompt_embeddings"]})
    return folder


def write_peft(folder: Path, peft_type: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    config = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))


@pytest.fixture
def task(served: Served, files: Path) -> Iterator[str]:
    """A task with two versions, gone afterwards."""
    for name in ("one", "two"):
        assert served.put("cli-task", (files / f"{name}.safetensors").read_bytes()).status_code == 201
    yield "cli-task"
    served.http.delete("/v1/prefixes/cli-task")


def test_push_a_native_file_and_a_peft_folder(cli: Cli, served: Served, files: Path) -> None:
    pushed = cli.json("push", "cli-push", files / "one.safetensors", "--note", "first")
    assert (pushed["task"], pushed["version"], pushed["note"], pushed["active"]) == ("cli-push", 1, "first", 1)
    second = cli.run("push", "cli-push", files / "prompt", "--activate", "false")
    assert second.exit_code == 0, second.output
    assert second.stdout.startswith("cli-push@2 ")
    assert second.stderr == ""
    described = served.http.get("/v1/prefixes/cli-push").json()
    assert [version["kind"] for version in described["versions"]] == ["kv", "soft"]
    assert described["active"] == 1


def test_push_takes_its_options_from_the_environment(cli: Cli, files: Path) -> None:
    result = cli.run("push", "cli-env", files / "one.safetensors", PREFIXSERVE_NOTE="of the env", PREFIXSERVE_JSON="1")
    assert json.loads(result.stdout)["note"] == "of the env"


def test_push_of_a_multitask_file(cli: Cli, files: Path) -> None:
    every = cli.json("push", "cli-many", files / "multitask", "--all")
    assert [manifest["task"] for manifest in every] == ["cli-many-0", "cli-many-1", "cli-many-2"]
    one = cli.json("push", "cli-one", files / "multitask", "--index", 1)
    assert one["digest"] == every[1]["digest"] != every[0]["digest"]
    assert "index must be 0 to 2" in cli.refused("push", "cli-one", files / "multitask")
    assert "--all" in cli.refused("push", "cli-one", files / "multitask", "--all", "--index", "1")


@pytest.mark.parametrize("name", ["one.safetensors", "prompt"])
def test_push_all_of_a_file_with_one_artefact_is_a_push(cli: Cli, files: Path, name: str) -> None:
    assert [manifest["task"] for manifest in cli.json("push", "cli-single", files / name, "--all")] == ["cli-single"]


def test_push_is_refused_with_the_servers_reason(cli: Cli, files: Path) -> None:
    assert "[a-z0-9][a-z0-9._-]{0,63}" in cli.refused("push", "Not A Name", files / "one.safetensors")
    assert "someone/else" in cli.refused("push", "cli-base", files / "other.safetensors")
    assert "nothing at" in cli.refused("push", "cli-base", files / "missing")
    (files / "half").mkdir(exist_ok=True)
    assert "adapter_config.json" in cli.refused("push", "cli-base", files / "half")
    accepted = cli.json("push", "cli-base", files / "other.safetensors", "--accept-base")
    assert accepted["base"] == "mismatch"


@pytest.fixture
def trained(model_path: Path, tmp_path: Path) -> Path:
    """A PEFT folder that claims the served model's folder, and a folder of another model beside it."""
    shutil.copytree(model_path, tmp_path / "another")
    config = json.loads((model_path / "config.json").read_text())
    (tmp_path / "another" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    tensors = {"prompt_embeddings": torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(9))}
    write_peft(tmp_path / "trained", "PROMPT_TUNING", tensors)
    claim(tmp_path / "trained", model_path)
    return tmp_path / "trained"


def claim(folder: Path, base: object) -> None:
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": base and str(base)}))


def test_push_verifies_the_folder_that_the_file_claims(cli: Cli, trained: Path, model_path: Path) -> None:
    pushed = cli.json("push", "cli-verified", trained)
    assert (pushed["base"], pushed["claimed_base"], pushed["active"]) == ("verified", str(model_path), 1)
    assert cli.json("push", "cli-dry", trained, "--dry-run")["base"] == "verified"
    assert cli.json("inspect", trained)["base"] == "verified"


def test_push_of_a_native_file_verifies_the_folder_that_it_claims(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    path.write_bytes(native(320, base_model=str(model_path)))
    pushed = cli.json("push", "cli-native", path)
    assert (pushed["base"], pushed["active"]) == ("verified", 1)


def test_push_of_what_was_trained_on_another_folder_is_refused(cli: Cli, served: Served, trained: Path) -> None:
    claim(trained, trained.parent / "another")
    result = cli.run("push", "cli-mismatch", trained)
    assert (result.exit_code, result.stdout) == (1, "")
    first, last = result.stderr.splitlines()
    assert first.startswith("base model: fingerprint ")
    assert str(trained.parent / "another") in first
    assert "error: 422: base model: trained for fingerprint " in last
    assert served.http.get("/v1/prefixes/cli-mismatch").status_code == 404
    assert cli.json("inspect", trained, exit_code=1)["base"] == "mismatch"
    assert cli.json("push", "cli-mismatch", trained, "--accept-base")["base"] == "mismatch"
    assert "version 1: trained for another model" in cli.run("show", "cli-mismatch").stdout


@pytest.mark.parametrize("base", ["/models/that/are/elsewhere", "", None])
def test_push_of_an_unverified_file_says_what_to_do_next(cli: Cli, served: Served, trained: Path, base: object) -> None:
    served.http.delete("/v1/prefixes/cli-unverified")
    claim(trained, base)
    first, second = cli.run("push", "cli-unverified", trained).stdout.splitlines()
    assert first.endswith("base unverified, active None")
    assert second.startswith("not live: base model: the file names ")
    assert "--accept-base" in second
    assert second.removeprefix("not live: ") in cli.run("show", "cli-unverified").stdout
    assert second.removeprefix("not live: ") == cli.json("inspect", trained)["next_step"]
    assert "prefixserve generate cli-unverified@1 TEXT" in cli.run("show", "cli-unverified").stdout
    assert " have no live version: `prefixserve show TASK`" in cli.run("list").stderr
    assert "--accept-base" in cli.refused("activate", "cli-unverified", "1")
    assert cli.json("activate", "cli-unverified", "1", "--accept-base")["active"] == 1
    text = cli.run("show", "cli-unverified").stdout
    assert "version 1: its base model was not verified" in text
    assert "generate cli-unverified TEXT" in text


def test_push_takes_the_folder_that_it_is_given(cli: Cli, trained: Path, model_path: Path) -> None:
    claim(trained, "/models/that/are/elsewhere")
    cli.json("push", "cli-folder", trained)
    pushed = cli.json("push", "cli-folder", trained, "--base-folder", model_path)
    assert (pushed["base"], pushed["unchanged"], pushed["active"]) == ("verified", True, 1)
    assert "expected a model's folder" in cli.refused("push", "cli-folder", trained, "--base-folder", trained)


def test_push_of_known_content_says_unchanged_and_whether_it_is_live(cli: Cli, task: str, files: Path) -> None:
    first, second = cli.run("push", task, files / "one.safetensors", "--note", "again").stdout.splitlines()
    assert first.endswith("base name-match, active 2, unchanged")
    assert second == f"not live: `prefixserve activate {task} 1` makes it live"
    assert cli.json("show", f"{task}@1")["note"] == "again"
    assert cli.run("push", task, files / "two.safetensors").stdout.splitlines()[1:] == []
    assert cli.json("push", task, files / "one.safetensors", "--activate", "true")["active"] == 1


def test_push_beside_weights_says_that_activating_ends_them(cli: Cli, served: Served, task: str, files: Path) -> None:
    weighed = served.http.post(f"/v1/prefixes/{task}/activate", json={"weights": {"2": 100}})
    assert weighed.status_code == 200, weighed.text
    pushed = cli.run("push", task, files / "one.safetensors").stdout
    assert pushed.endswith(f"`prefixserve activate {task} 1` makes it live and ends the weights that are set\n")


def test_dry_run_checks_the_files_and_sends_nothing(cli: Cli, served: Served, files: Path) -> None:
    def dry(name: str, *options: str, exit_code: int = 0) -> Any:
        return cli.json("push", "cli-dry", files / name, "--dry-run", *options, exit_code=exit_code)

    good = dry("one.safetensors")
    assert (good["task"], good["fits"], good["num_virtual_tokens"]) == ("cli-dry", True, 20)
    assert [one["task"] for one in dry("multitask", "--all")] == ["cli-dry-0", "cli-dry-1", "cli-dry-2"]
    wrong = dry("wrong.safetensors", exit_code=1)
    assert wrong["fits"] is False
    assert wrong["reason"]
    assert dry("other.safetensors", exit_code=1)["base"] == "mismatch"
    assert dry("other.safetensors", "--accept-base")["fits"] is True
    named = cli.run("push", NAME, files / "one.safetensors", "--dry-run")
    assert (named.exit_code, f"own name '{NAME}'" in named.stdout) == (1, True)
    assert served.http.get("/v1/prefixes/cli-dry").status_code == 404


def test_progress_is_shown_on_a_terminal(cli: Cli, files: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "server", "push", "cli-bar", str(files / "one.safetensors"), "--json"]
    env = os.environ | cli.env | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        os.close(leader)
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["task"] == "cli-bar"
    assert process.returncode == 0
    assert b"one.safetensors" in shown
    assert "━" in shown.decode()


def test_list_and_show(cli: Cli, served: Served, task: str) -> None:
    listed = cli.json("list")
    assert listed == served.http.get("/v1/prefixes", params={"limit": 1000}).json()["prefixes"]
    assert task in {one["task"] for one in listed}
    long = "cli-" + "n" * 60
    served.put(long, native(310))
    assert {task, long} <= set(cli.run("list").stdout.split())
    assert cli.json("show", task) == served.http.get(f"/v1/prefixes/{task}").json()
    assert cli.json("show", f"{task}@1")["num_virtual_tokens"] == 20
    text = cli.run("show", task).stdout
    assert f"task: {task}\n" in text
    assert all(version["digest"][:12] in text for version in cli.json("show", task)["versions"])
    assert "no task 'nothing'" in cli.refused("show", "nothing")


def test_show_says_how_to_ask_a_task_as_it_was_trained(cli: Cli, task: str) -> None:
    text = cli.run("show", task).stdout
    for words in (f"/generate?task={task}", "/v1/completions", '"temperature": 0', "chat template"):
        assert words in text


def test_activate_and_rollback(cli: Cli, task: str) -> None:
    digest = cli.json("show", f"{task}@2")["digest"]
    for version, active in (("1", 1), (digest[:12], 2), ("previous", 1)):
        assert cli.json("activate", task, version)["active"] == active
    assert cli.json("rollback", task)["active"] == 2
    text = cli.run("rollback", task).stdout
    assert "active: 1\n" in text
    assert "versions: [" not in text
    assert digest[:12] in text
    assert "no version '9'" in cli.refused("activate", task, "9")


def test_rm_of_a_version_and_of_a_task(cli: Cli, served: Served, task: str) -> None:
    assert "active" in cli.refused("rm", f"{task}@2")
    assert cli.json("rm", f"{task}@1") == {"deleted": f"{task}@1"}
    assert [version["version"] for version in cli.json("show", task)["versions"]] == [2]
    assert cli.run("rm", task).exit_code == 0
    assert served.http.get(f"/v1/prefixes/{task}").status_code == 404


@pytest.mark.parametrize("name", ["", "?limit=1", "a/b", ".."])
def test_rm_of_what_is_no_name_deletes_nothing(cli: Cli, served: Served, task: str, name: str) -> None:
    before = served.http.get("/v1/prefixes").json()
    cli.refused("rm", name)
    assert served.http.get("/v1/prefixes").json() == before


def test_generate_whole_and_streamed(cli: Cli, served: Served, task: str) -> None:
    for name, query in ((task, task), (f"{task}@1", f"{task}@1"), (NAME, None)):
        expected = served.generate(PROMPT, query, max_new_tokens=12).json()["generated_text"]
        arguments = ("generate", name, PROMPT, "--max-new-tokens", 12)
        assert cli.run(*arguments).stdout == expected + "\n"
        assert cli.run(*arguments, "--stream").stdout == expected + "\n"
        answer = cli.json(*arguments)
        assert answer["generated_text"] == expected
        assert answer["details"]["version"] == {task: 2, f"{task}@1": 1}.get(name)
        events = [json.loads(line) for line in cli.run(*arguments, "--stream", "--json").stdout.splitlines()]
        assert len(events) == answer["details"]["generated_tokens"]
        assert events[-1]["generated_text"] == expected


def test_generate_is_refused_with_the_servers_reason(cli: Cli, task: str) -> None:
    for more in ((), ("--stream",)):
        assert "no task 'nothing'" in cli.refused("generate", "nothing", PROMPT, *more)
        assert "must be <= 256" in cli.refused("generate", task, PROMPT, "--max-new-tokens", "300", *more)


def test_server_that_is_not_there_is_one_line(cli: Cli) -> None:
    assert "http://127.0.0.1:1" in cli.refused("list", "--url", "http://127.0.0.1:1")
    assert "url must be" in cli.refused("list", "--url", "http://127.0.0.1:port")
    assert "error: " in cli.refused("list", "--url", "no-scheme")


def test_inspect_says_what_it_is(cli: Cli, served: Served, files: Path) -> None:
    for name, kind, num_virtual_tokens, base in (
        ("one.safetensors", "kv", 20, "name-match"),
        ("named.safetensors", "kv", 5, "name-match"),
        ("prompt", "soft", 4, "unverified"),
    ):
        found = cli.json("inspect", files / name)
        layout = Layout(found["kind"], num_decoder_tokens=num_virtual_tokens)
        assert (found["kind"], found["num_virtual_tokens"], found["base"]) == (kind, num_virtual_tokens, base)
        assert found["device_bytes"] == served.state.engine.bytes_on_device(layout)
        assert (found["fits"], found["reason"], found["model"]) == (True, None, NAME)
        assert (found["placement"], found["separator"], found["parts"]) == ("prefix", None, None)
    assert cli.json("inspect", files / "multitask", "--index", "2")["num_virtual_tokens"] == 4


def test_inspect_of_an_infix(cli: Cli, files: Path) -> None:
    found = cli.json("inspect", files / "infix.safetensors")
    assert (found["placement"], found["separator"], found["fits"]) == ("infix", 46, True)
    assert "placement: infix\nseparator: 46\n" in cli.run("inspect", files / "infix.safetensors").stdout


def test_inspect_needs_no_place_for_a_store(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(files / "missing"))
    assert cli.json("inspect", files / "one.safetensors")["base"] == "name-match"
    assert cli.json("push", "cli-dry", files / "one.safetensors", "--dry-run")["fits"] is True


def test_inspect_of_a_download_is_verified(cli: Cli, served: Served, task: str, tmp_path: Path) -> None:
    path = tmp_path / "downloaded.safetensors"
    path.write_bytes(served.http.get(f"/v1/prefixes/{task}/versions/1/file").content)
    assert cli.json("inspect", path)["base"] == "verified"


def test_inspect_says_why_it_does_not_fit(cli: Cli, files: Path) -> None:
    for name, options, reason in (
        ("wrong.safetensors", (), "header"),
        ("long.safetensors", (), "num_virtual_tokens must be 1 to 254, got 300"),
        ("one.safetensors", ("--max-virtual-tokens", "8"), "num_virtual_tokens must be 1 to 8, got 20"),
        ("other.safetensors", (), "someone/else"),
        ("multitask", (), "index must be 0 to 2"),
        ("multitask", ("--index", "3"), "index must be 0 to 2"),
        ("one.safetensors", ("--index", "0"), "index picks a task of a PEFT multitask file; a native file has one"),
        ("other.safetensors", (), "; accept_base=1 (--accept-base) takes it as it is"),
    ):
        found = cli.json("inspect", files / name, *options, exit_code=1)
        assert found["fits"] is False
        assert reason in found["reason"]
    pool = cli.run("inspect", files / "one.safetensors", PREFIXSERVE_PREFIX_BYTES="1KiB")
    assert (pool.exit_code, "fits: False" in pool.stdout, "the pool has 1024" in pool.stdout) == (1, True, True)
    assert "nothing at" in cli.refused("inspect", files / "missing")


def test_file_that_cannot_be_written_is_named_in_plain_words(cli: Cli, files: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "prompt.npy", numpy.zeros((4, 32), numpy.float32))
    output = tmp_path / "missing" / "out.safetensors"
    refused = cli.refused("convert", tmp_path / "prompt.npy", output)
    assert f"error: {output}: No such file or directory" in refused


def test_fold_writes_a_file_that_the_server_takes(cli: Cli, tmp_path: Path) -> None:
    torch.manual_seed(4)
    width = 2 * 2 * 2 * 8  # keys and values, layers, KV heads, head_dim
    tensors = {
        "embedding.weight": torch.randn(6, 10),
        "transform.0.weight": torch.randn(12, 10),
        "transform.0.bias": torch.randn(12),
        "transform.2.weight": torch.randn(width, 12),
        "transform.2.bias": torch.randn(width),
    }
    checkpoint, output = tmp_path / "unfolded.safetensors", tmp_path / "folded.safetensors"
    checkpoint.write_bytes(save(tensors))
    folded = cli.json("fold", checkpoint, output)
    assert (folded["file"], folded["num_virtual_tokens"]) == (str(output), 6)
    pushed = cli.json("push", "cli-folded", output)
    assert (pushed["digest"], pushed["base"]) == (folded["digest"], "verified")
    assert "nothing at" in cli.refused("fold", tmp_path / "missing", output)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"transform.4.weight": torch.zeros(4, 4)}, "a deeper one: 'transform.4.weight'"),
        ({"embedding.weight": torch.zeros(6, 10, dtype=torch.int64)}, "got torch.int64"),
        ({"control_trans_enc.0.weight": torch.zeros(4, 4)}, "got an encoder-decoder's"),
    ],
)
def test_fold_refuses_other_checkpoints(cli: Cli, tmp_path: Path, more: dict[str, torch.Tensor], reason: str) -> None:
    names = ("transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias")
    tensors = {"embedding.weight": torch.zeros(6, 10)} | dict.fromkeys(names, torch.zeros(2)) | more
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    output = tmp_path / "folded.safetensors"
    assert reason in cli.refused("fold", tmp_path / "pytorch_model.bin", output)
    assert not output.exists()


def test_convert_writes_a_file_that_the_server_takes(cli: Cli, served: Served, tmp_path: Path) -> None:
    table = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(7))
    torch.save(table, tmp_path / "decoder.pt")
    numpy.save(tmp_path / "prompt.npy", table.numpy())
    output = tmp_path / "made.safetensors"
    for path in (tmp_path / "decoder.pt", tmp_path / "prompt.npy", tmp_path):
        made = cli.json("convert", path, output)
        assert made == {
            "file": str(output),
            "kind": "soft",
            "placement": "prefix",
            "separator": None,
            "parts": None,
            "num_virtual_tokens": 6,
            "num_bytes": 6 * HIDDEN * 4,
            "base_model": None,
        }
        assert torch.equal(load(output.read_bytes())["embeddings"], table)
    assert cli.json("push", "cli-converted", output)["base"] == "unverified"
    assert cli.json("convert", tmp_path, output, "--base-model", "owner/mini")["base_model"] == "owner/mini"
    assert cli.json("inspect", output)["base"] == "name-match"
    text = cli.run("convert", tmp_path, output, "--placement", "infix").stdout
    assert f"file: {output}\nkind: soft\nplacement: infix\n" in text
    assert cli.json("push", "cli-converted", output)["placement"] == "infix"


def test_convert_makes_a_kv_infix(cli: Cli, tmp_path: Path) -> None:
    lists = [torch.randn(1, KV_HEADS, 3, HEAD_DIM) for _ in range(LAYERS)]
    torch.save(
        {"trainable_keys": lists, "trainable_values": lists, "frozen_keys": [], "frozen_values": []},
        tmp_path / "cartridge.pt",
    )
    output = tmp_path / "made.safetensors"
    assert "needs a separator" in cli.refused("convert", tmp_path, output, "--placement", "infix")
    assert "separator belongs to a KV infix" in cli.refused("convert", tmp_path, output, "--separator", "46")
    wrong = ("--placement", "infix", "--separator", "100000")
    assert "separator must be a token id" in cli.refused("convert", tmp_path, output, *wrong)
    assert not output.exists()
    made = cli.json("convert", tmp_path, output, "--placement", "infix", "--separator", "46")
    assert (made["kind"], made["placement"], made["separator"]) == ("kv", "infix", 46)
    assert cli.json("inspect", output)["separator"] == 46


def test_convert_is_refused_with_the_reason(cli: Cli, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "made.safetensors"
    assert "nothing at" in cli.refused("convert", tmp_path / "missing", output)
    assert "need no converting" in cli.refused("convert", files / "one.safetensors", output)
    torch.save(torch.zeros(6, HIDDEN + 1), tmp_path / "decoder.pt")
    expected = f"expected [num_virtual_tokens, {HIDDEN}], got [6, {HIDDEN + 1}]"
    assert expected in cli.refused("convert", tmp_path / "decoder.pt", output)
    torch.save(torch.zeros(6, HIDDEN), tmp_path / "decoder.pt")
    assert "error: " in cli.refused("convert", tmp_path / "decoder.pt", tmp_path / "no" / "folder")
    assert not output.exists()


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder: three layers in the decoder, two in the encoder."""
    path = tmp_path_factory.mktemp("seq2seq") / "bart"
    torch.manual_seed(6)
    sizes = {"d_model": HIDDEN, "vocab_size": 96, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **heads, encoder_layers=2, decoder_layers=3, max_position_embeddings=64)
    BartForConditionalGeneration(config).save_pretrained(path)
    return path


def test_convert_and_inspect_for_an_encoder_decoder(cli: Cli, bart: Path, tmp_path: Path) -> None:
    output = tmp_path / "made.safetensors"
    torch.save(torch.randn(6, HIDDEN), tmp_path / "encoder.pt")
    model = ("--model", bart)
    assert "of a decoder-only model" in cli.refused("convert", tmp_path / "encoder.pt", output)
    made = cli.json("convert", tmp_path / "encoder.pt", output, *model)
    assert (made["kind"], made["parts"]) == ("soft", {"decoder": 0, "encoder": 6, "cross": 0})
    infix = ("--placement", "infix")
    assert "an infix needs a decoder-only model" in cli.refused("convert", tmp_path, output, *model, *infix)
    inspected = cli.json("inspect", output, *model)
    assert (inspected["parts"], inspected["fits"]) == (made["parts"], True)
    assert "got one for an encoder-decoder" in cli.json("inspect", output, exit_code=1)["reason"]

    tensors = {}
    for table, mlp, num_layers, n in (("wte", "", 3, 4), ("wte_enc", "_enc", 2, 5), ("wte2", "2", 3, 2)):
        tensors |= {f"{table}.weight": torch.randn(n, HIDDEN), f"control_trans{mlp}.0.weight": torch.randn(7, HIDDEN)}
        width = 2 * num_layers * HIDDEN
        tensors |= {f"control_trans{mlp}.0.bias": torch.randn(7), f"control_trans{mlp}.2.bias": torch.randn(width)}
        tensors[f"control_trans{mlp}.2.weight"] = torch.randn(width, 7)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    made = cli.json("convert", tmp_path / "pytorch_model.bin", output, *model)
    assert (made["kind"], made["parts"]) == ("kv", {"decoder": 4, "encoder": 5, "cross": 2})
    assert cli.json("inspect", output, *model)["parts"] == made["parts"]
    assert 'parts: {"decoder": 4, "encoder": 5, "cross": 2}' in cli.run("inspect", output, *model).stdout
    folded = cli.json("fold", tmp_path / "pytorch_model.bin", output, *model)
    assert folded["num_virtual_tokens"] == 5
    assert cli.json("inspect", output, *model)["base"] == "verified"


def test_push_of_an_ensemble(cli: Cli, served: Served, task: str, tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    content = {"kind": "ensemble", "members": [f"{task}@1", f"{task}@2"], "rule": "mean_probs"}
    path.write_text(json.dumps(content))
    pushed = cli.json("push", "cli-ensemble", path, "--note", "both", "--activate", "false")
    assert (pushed["kind"], pushed["members"], pushed["rule"]) == ("ensemble", content["members"], "mean_probs")
    assert (pushed["note"], pushed["active"]) == ("both", None)
    assert cli.run("push", "cli-ensemble", path).stdout.startswith("cli-ensemble@1 ")
    assert cli.json("show", "cli-ensemble@1")["members"] == content["members"]
    assert "member of cli-ensemble@1" in cli.refused("rm", f"{task}@1")
    for option in ("--all", "--dry-run"):
        assert "an ensemble" in cli.refused("push", "cli-ensemble", path, option)
    path.write_text(json.dumps(content | {"rule": "sum"}))
    assert "rule" in cli.refused("push", "cli-ensemble", path)
    path.write_text(json.dumps(content | {"kind": "kv"}))
    assert "both.json: kind must be 'ensemble', got 'kv'" in cli.refused("push", "cli-ensemble", path)
    path.write_text('{"kind": "ensemble", "kind": "ensemble"}')
    assert "both.json: duplicate key 'kind'" in cli.refused("push", "cli-ensemble", path)
    served.http.delete("/v1/prefixes/cli-ensemble")


def test_model_path_is_alone_on_the_last_line(cli: Cli, model_path: Path) -> None:
    for verb in ("path", "fetch"):
        result = cli.run("model", verb, model_path)
        assert result.stdout.splitlines()[-1] == str(model_path)
        assert cli.json("model", verb, model_path) == {"name": NAME, "path": str(model_path)}
    assert "prefixserve model fetch" in cli.refused("model", "path")  # this cache is empty
    assert "owner/name" in cli.refused("model", "path", "nothing-here")


def test_serve_refuses_wrong_settings_in_one_line(cli: Cli) -> None:
    assert "loopback" in cli.refused("serve", "--host", "0.0.0.0")
    assert "max_step_tokens" in cli.refused("serve", "--max-rows", "100", "--max-step-tokens", "50")
    assert "port" in cli.refused("serve", PREFIXSERVE_PORT="99999")


def test_serve_says_how_much_memory_it_lacks(cli: Cli, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--kv-bytes", "900TiB", "--data-dir", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, env=os.environ | cli.env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "bytes of memory for kv_bytes and prefix_bytes, got: [Errno 12]" in refused.stderr.splitlines()[-1]


def test_commands_that_speak_http_do_without_torch() -> None:
    program = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
