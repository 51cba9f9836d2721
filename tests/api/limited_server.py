"""A server or a command in a process of its own, which the disk can refuse to write: a small one that was mounted, or,
where nothing can be mounted, the system by a limit on the size of files, and by permissions that hold for root too."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import httpx
from typer.testing import CliRunner

from server.api import upkeep
from server.cli import app
from server.config import Settings
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, serve_in_thread

T = TypeVar("T")
SIZE = 1024 * 1024
START_S = 120
CAPABILITIES = 0x20080522  # the version of what the system calls take
OVERRIDES = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
UNLIMITED = resource.RLIM_INFINITY


class LimitedServer:
    """What a test asks over HTTP, and what it lets the server's process do."""

    def __init__(self, process: BaseProcess, url: str, http: httpx.Client, pipe: Connection) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.http = http
        self._pipe = pipe
        self._served = Served(url, None, http, None, None)  # type: ignore[arg-type]  # the rest is in that process

    def generate(self, inputs: str, task: str | None = None, **parameters: object) -> httpx.Response:
        return self._served.generate(inputs, task, **parameters)

    def put(self, task: str, body: bytes) -> httpx.Response:
        return self._served.put(task, body)

    def call(self, function: Callable[..., T], *args: object) -> T:
        """`function(served, *args)` in the server's process."""
        self._pipe.send((function, args))
        found: T = self._pipe.recv()
        return found


class Disk(ABC):
    """A folder that can be full, or read only. `max_file_bytes`: what a process started now may write."""

    kind = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.max_file_bytes = UNLIMITED
        path.mkdir()

    @abstractmethod
    def fill(self, server: LimitedServer | None = None) -> None:
        """Leave no room on it, also for a server that runs."""

    @abstractmethod
    def free(self, server: LimitedServer | None = None) -> None:
        """Give the room back."""

    @abstractmethod
    def set_read_only(self, is_read_only: bool) -> None:
        """Let nothing be written, or again; only while nothing on it is open to be written."""

    @abstractmethod
    def close(self) -> None:
        """Unmount what was mounted."""


class MountedDisk(Disk):
    """A file system of its own of `SIZE` bytes."""

    kind = "mounted"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _mount(path, "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")

    def fill(self, server: LimitedServer | None = None) -> None:
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self, server: LimitedServer | None = None) -> None:
        (self.path / "filler").unlink()

    def set_read_only(self, is_read_only: bool) -> None:
        _mount(self.path, "-o", f"remount,{'ro' if is_read_only else 'rw'}")

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


class ProcessLimits(Disk):
    """Every file that the server writes is refused: as with a quota, whatever the folder."""

    kind = "limits"

    def fill(self, server: LimitedServer | None = None) -> None:
        self._limit(0, server)

    def close(self) -> None:
        """Nothing was mounted."""

    def free(self, server: LimitedServer | None = None) -> None:
        self._limit(UNLIMITED, server)

    def set_read_only(self, is_read_only: bool) -> None:
        for folder, _, names in os.walk(self.path):
            for name in names:
                os.chmod(Path(folder) / name, 0o444 if is_read_only else 0o644)
            os.chmod(folder, 0o555 if is_read_only else 0o755)

    def _limit(self, num_bytes: int, server: LimitedServer | None) -> None:
        self.max_file_bytes = num_bytes
        if server is not None:
            _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def _mount(path: Path, *options: str) -> None:
    subprocess.run(["mount", *options, path], check=True, capture_output=True)


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            MountedDisk(Path(folder) / "disk").close()
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False
    return True


DISKS: tuple[type[Disk], ...] = (ProcessLimits, MountedDisk) if _can_mount() else (ProcessLimits,)


@contextmanager
def serving(settings: Settings, model_path: Path, disk: Disk) -> Iterator[LimitedServer]:
    with _child(_serve, settings, model_path, disk.max_file_bytes) as (process, pipe):
        assert pipe.poll(START_S), "the server did not start in time"
        url = pipe.recv()
        assert isinstance(url, str), url
        with httpx.Client(base_url=url, timeout=30) as http:
            yield LimitedServer(process, url, http, pipe)
        pipe.send(None)
        process.join(30)
        assert process.exitcode == 0


def run(disk: Disk, *words: str) -> tuple[int, str]:
    """Exit status and output of a command."""
    with _child(_run, words, disk.max_file_bytes) as (_, pipe):
        assert pipe.poll(START_S), "the command did not end in time"
        found: tuple[int, str] = pipe.recv()
        return found


@contextmanager
def _child(target: Callable[..., None], *args: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.api.limited_server"])  # so that a start takes no seconds
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(theirs, dict(os.environ), *args))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(
    pipe: Connection, environment: dict[str, str], settings: Settings, model_path: Path, max_file_bytes: int
) -> None:
    """Usage and what is resident are written all the time."""
    _limit_this_process(environment, max_file_bytes)
    upkeep.FLUSH_S = upkeep.SAVE_S = 0.1
    try:
        state = make_state(settings, ModelFiles(model_path, NAME))
    except Exception as error:
        pipe.send(error)
        raise
    for served in serve_in_thread(state):
        pipe.send(served.url)
        while (asked := pipe.recv()) is not None:
            function, args = asked
            pipe.send(function(served, *args))


def _run(pipe: Connection, environment: dict[str, str], words: tuple[str, ...], max_file_bytes: int) -> None:
    _limit_this_process(environment, max_file_bytes)
    done = CliRunner().invoke(app, list(words))
    pipe.send((done.exit_code, done.output))


def _limit_this_process(environment: dict[str, str], max_file_bytes: int) -> None:
    os.environ.update(environment)  # a test's, which the process that this one was forked from has not
    quiet = os.open(os.devnull, os.O_WRONLY)  # what is written to a test's captured output is a file too
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for each in range(3):
        sets[each] &= ~OVERRIDES
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
