"""Starts with a registry that is not the files', on a disk and on S3, with SQLite and with Redis.

    PYTHONPATH=load_tests python -m faults.wrong_registry

A real server with a tiny model stores versions; all files are made old. Then come the mistakes, each its own start:
another data folder or Redis database, the same one emptied or moved away, and one with tasks of its own. A server that
starts is stopped. After each the files are counted, and in the end, with the right registry again, the versions that
answer. Exits 1 where a file is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fsspec
import httpx
from faults.replicas import native
from machine import ROOT
from served import free_port

from tests.byte_model import save_byte_model
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.s3_process import S3Process

NUM_VERSIONS = 5
READY_S = 120
OCTETS = {"Content-Type": "application/octet-stream"}


@contextmanager
def start(options: list[str]) -> Iterator[httpx.Client | None]:
    """None where the start was refused."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *options]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
    ):
        try:
            ends_s = time.monotonic() + READY_S
            while process.poll() is None and not is_ready(http):
                assert time.monotonic() < ends_s, "the server was not ready in time"
                time.sleep(0.1)
            yield http if process.poll() is None else None
        finally:
            process.terminate()
            _, errors = process.communicate()
            if process.returncode == 1:
                print(f"    {errors.decode().strip().splitlines()[-1]}")


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def upload(options: list[str], prefix: str) -> None:
    with start(options) as http:
        assert http is not None
        for number in range(NUM_VERSIONS):
            target = f"/v1/prefixes/{prefix}{number}?accept_base=1"
            http.put(target, content=native(number), headers=OCTETS).raise_for_status()


def num_files(root: str) -> int:
    fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
    return sum(found.endswith(".safetensors") and "/TRASH/" not in found for found in fs.find(path))


def make_old(root: Path) -> None:
    for path in root.rglob("*.safetensors"):
        os.utime(path, (1e9, 1e9))


def walk(root: str, folder: Path, model: Path, redis: RedisProcess | None) -> bool:
    """Whether all files are there in the end."""
    common = ["--model", str(model), "--blob-url", root]

    def at(number: int) -> list[str]:
        """The options of a registry; the first one is the files'."""
        own = ["--data-dir", str(folder / f"data-{number}"), *common]
        return own if redis is None else [*own, "--redis-url", f"{redis.url.removesuffix('/0')}/{number}"]

    upload(at(0), "t")
    upload([*at(2), "--blob-url", str(folder / "elsewhere")], "other")
    if "://" not in root:
        make_old(Path(root))
    for mistake, number in (("new registry", 1), ("registry with tasks of its own", 2), ("registry moved away", 0)):
        if mistake == "registry moved away":
            swap(folder, redis)
        with start(at(number)) as http:
            is_refused = http is None
        print(f"  {mistake}: {'refused' if is_refused else 'started'}, files {num_files(root)} of {NUM_VERSIONS}")
    swap(folder, redis)
    answers = 0
    with start(at(0)) as http:
        for number in range(NUM_VERSIONS) if http is not None else ():
            answers += http.post(f"/generate?task=t{number}", json={"inputs": "x"}).status_code == 200
    print(f"  the right registry again: {answers} of {NUM_VERSIONS} versions answer, files {num_files(root)}")
    return num_files(root) == answers == NUM_VERSIONS


def swap(folder: Path, redis: RedisProcess | None) -> None:
    """The files' registry and an empty one."""
    if redis is not None:
        with redis.client() as client:
            client.swapdb(0, 9)
    one, other = folder / "data-0", folder / "away"
    one.rename(folder / "kept")
    if other.exists():
        other.rename(one)
    (folder / "kept").rename(other)


def main() -> None:
    is_whole = True
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = save_byte_model(folder / "model")
        redis = RedisProcess(folder / "redis")
        redis.start()
        stack.callback(redis.kill)
        s3 = S3Process()
        stack.callback(s3.kill)
        os.environ.update(s3.environment)
        for registry in (None, redis):
            for where in ("files", "S3"):
                print(f"{where}, {'SQLite' if registry is None else 'Redis'}")
                place = folder / f"{where}-{registry is None}"
                with redis.client() as client:
                    client.flushall()
                root = str(place / "blobs") if where == "files" else s3.make_bucket()
                is_whole = walk(root, place, model, registry) and is_whole
    sys.exit(not is_whole)


if __name__ == "__main__":
    main()
