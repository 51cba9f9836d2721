"""What `serve` says, and when: wrong options at once, `ready` when it is, and a request that works."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.byte_model import save_byte_model
from tests.conftest import NATIVE, OPERATOR_KEY, native, write_key
from tests.program import READY_S, ROOT

# Runs a command of the command line and says whether torch was imported for it.
WITHOUT_TORCH = """
import sys
from server.__main__ import main
try:
    main()
finally:
    print("imported" if {"torch", "transformers"} & set(sys.modules) else "spared", file=sys.stderr)
"""
INHERITED = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXSERVE_")}


def refused(tmp_path: Path, *arguments: str) -> str:
    """The one line that a wrong command ends with, before torch is imported."""
    env = INHERITED | {"PREFIXSERVE_DATA_DIR": str(tmp_path / "data"), "PREFIXSERVE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    *lines, imported = done.stderr.splitlines()
    assert (imported, done.stdout) == ("spared", ""), done.stderr
    assert done.returncode == (2 if "No such option" in done.stderr else 1)
    if done.returncode == 1:
        assert len(lines) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("serve", "--no-such-option"), "No such option"),
        (("serve", "--port", "99999"), "port"),
        (("serve", "--dtype", "float8"), "dtype"),
        (("serve", "--device", "tpu"), "device must be cpu, cuda or cuda:N"),
        (("serve", "--kv-bytes", "much"), "kv_bytes"),
        (("serve", "--kv-bytes", "1,5GiB"), "kv_bytes: a size must be as 512MiB or 1.5GiB, got '1,5GiB'"),
        (("serve", "--max-upload-bytes", "2GiB!"), "max_upload_bytes"),
        (("serve", "--max-rows", "0"), "max_rows"),
        (("serve", "--host", "no-such-host.invalid"), "no-such-host.invalid"),
        (("serve", "--host", "0.0.0.0", "--port", "0"), "loopback"),
        (("serve", "--model", "/nowhere"), "/nowhere"),
        (("serve", "--operator-key-file", "/nowhere"), "/nowhere: No such file"),
        (("serve", "--publish-examples", "/nowhere"), "/nowhere"),
        (("serve", "--redis-url", "http://127.0.0.1"), "rediss://"),
        (("serve", "--blob-url", "nothing://bucket"), "nothing"),
        (("serve", "--data-dir", "/dev/null/data", "--port", "0"), "/dev/null"),
        (("list", "--url", "http://127.0.0.1:1"), "127.0.0.1:1"),
        (("push", "task", "/nowhere"), "/nowhere"),
        (("inspect", "/nowhere"), "/nowhere"),
        (("inspect", str(ROOT), "--model", "/nowhere"), "/nowhere"),
        (("fold", "/nowhere", "out"), "/nowhere"),
        (("convert", "/nowhere", "out"), "/nowhere"),
        (("model", "path", "/nowhere"), "/nowhere"),
        (("tenant", "create", "x", "--limit", "weight=0", "--create"), "weight"),
        (("tenant", "create", "x"), "no registry"),
        (("registry", "copy", "/nowhere", "/elsewhere"), "/nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_torch_is_imported(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    assert reason in refused(tmp_path, *arguments)


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}: another program uses it" in refused(tmp_path, "serve", "--port", str(port))


@pytest.mark.parametrize("name", ["localhost", "::1"])
def test_a_port_in_use_is_found_by_every_name(tmp_path: Path, name: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as other:
        other.bind((name, 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}: another program uses it" in refused(
            tmp_path, "serve", "--host", name, "--port", str(port)
        )


@dataclass(frozen=True)
class Start:
    """A server in a process of its own, and the lines of its log so far."""

    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)
    is_ready: threading.Event = field(default_factory=threading.Event)
    reader: list[threading.Thread] = field(default_factory=list)

    def wait(self) -> None:
        assert self.is_ready.wait(READY_S), "".join(self.lines)

    def end(self) -> str:
        """All that it wrote."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0
        self.reader[0].join(10)
        return "".join(self.lines)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return {entry["event"]: entry for entry in map(json.loads, self.lines)}


@contextmanager
def started(folder: Path, *options: str, stderr: int = subprocess.PIPE, **env: str) -> Iterator[Start]:
    data = ("--data-dir", str(folder / "data"), "--port", "0", "--dtype", "float32")
    command = [sys.executable, "-m", "server", "serve", *data, *options]
    with subprocess.Popen(command, cwd=ROOT, env=INHERITED | env, stdout=stderr, stderr=stderr) as process:
        try:
            yield Start(process)
        finally:
            process.kill()


def follow(start: Start, descriptor: int) -> None:
    """Read what the server writes, until its end."""

    def read() -> None:
        with os.fdopen(descriptor, "r", errors="replace", newline="\n", closefd=False) as file:
            try:
                for line in file:
                    start.lines.append(line)
                    if "curl http" in line or "curl 'http" in line:
                        start.is_ready.set()
            except OSError:  # the terminal is gone
                return

    start.reader.append(threading.Thread(target=read))
    start.reader[0].start()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("tiny") / "tiny")


def run(curl: str, **env: str) -> Any:
    """As a shell runs it."""
    done = subprocess.run(
        ["sh", "-c", curl.replace("curl ", "curl -sS --max-time 30 ", 1)],
        env=INHERITED | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_ready_is_said_when_requests_are_answered_and_the_curl_works(tmp_path: Path, tiny: Path, host: str) -> None:
    key = ("--operator-key-file", str(write_key(tmp_path / "operator.key", OPERATOR_KEY)))
    has_key = host == "0.0.0.0"
    options = ("--model", str(tiny), "--host", host, "--log-json", *(key if has_key else ()))
    with started(tmp_path, *options) as start:
        assert start.process.stdout is not None
        assert start.process.stderr is not None
        follow(start, start.process.stderr.fileno())
        start.wait()
        ready, curl = start.entries["ready"], start.entries["try"]["curl"]
        assert ready["port"] > 0
        assert ready["registry"] == str(tmp_path / "data" / "registry.sqlite")
        assert ("Bearer $PREFIXSERVE_API_KEY" in curl) is has_key
        assert OPERATOR_KEY not in curl
        assert f":{ready['port']}/generate'" in shlex.join(shlex.split(curl)).replace("/generate ", "/generate' ")
        assert "generated_text" in run(curl, PREFIXSERVE_API_KEY=OPERATOR_KEY)
        lines = start.end()
        assert start.process.stdout.read() == b""
    for line in lines.splitlines():
        assert isinstance(json.loads(line), dict), line
    assert "\x1b" not in lines
    assert "\r" not in lines


def test_the_curl_names_a_task_that_answers(tmp_path: Path, tiny: Path) -> None:
    for name in ("one", "two"):
        with started(tmp_path, "--model", str(tiny), "--log-json") as start:
            assert start.process.stderr is not None
            follow(start, start.process.stderr.fileno())
            start.wait()
            curl = start.entries["try"]["curl"]
            assert ("?task=zebra" in curl) is (name == "two")
            assert "generated_text" in run(curl)
            url = f"http://127.0.0.1:{start.entries['ready']['port']}/v1/prefixes"
            for task in ("ape", "zebra"):
                httpx.put(f"{url}/{task}", content=native(1), headers={"Content-Type": NATIVE}).raise_for_status()
            httpx.post(f"{url}/ape/disable").raise_for_status()
            start.end()


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "xterm"}])
def test_a_terminal_is_coloured_only_where_it_may_be(tmp_path: Path, tiny: Path, env: dict[str, str]) -> None:
    leader, follower = pty.openpty()
    with started(tmp_path, "--model", str(tiny), stderr=follower, **{"TERM": "xterm", **env}) as start:
        os.close(follower)
        follow(start, leader)
        start.wait()
        lines = start.end()
    os.close(leader)
    is_dumb = env["TERM"] == "dumb" if "TERM" in env else False
    assert ("\x1b[3" in lines) is (env == {"TERM": "xterm"}), lines
    assert not is_dumb or "\x1b" not in lines
    assert not is_dumb or "\r" not in lines.replace("\r\n", "\n"), lines


def test_a_file_has_no_colours_and_no_bars(tmp_path: Path, tiny: Path) -> None:
    with started(tmp_path, "--model", str(tiny), TERM="xterm-256color") as start:
        assert start.process.stderr is not None
        follow(start, start.process.stderr.fileno())
        start.wait()
        (curl,) = (line for line in start.lines if line.startswith("curl "))
        assert "generated_text" in run(curl)
        lines = start.end()
    assert "ready" in lines
    assert "\x1b" not in lines
    assert "\r" not in lines


def test_what_ends_a_start_is_json_too(tmp_path: Path) -> None:
    for given in (("--log-json",), ()):
        env = INHERITED | ({} if given else {"PREFIXSERVE_LOG_JSON": "1"})
        command = [sys.executable, "-m", "server", "serve", *given, "--model", "/nowhere"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        entry = json.loads(line)
        assert (entry["level"], "/nowhere" in entry["reason"]) == ("error", True)
