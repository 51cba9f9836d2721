"""A real S3 server on a free port: moto's, over HTTP."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import uuid

import fsspec
import httpx


class S3Process:
    """Started and killed; what it holds is in its memory."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while True:
            try:
                httpx.get(self.url, timeout=5)
                return
            except httpx.TransportError:
                assert self._process.poll() is None, "moto's server did not start"
                assert time.monotonic() < deadline_s, "moto's server did not start in time"
                time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """What the library reads."""
        names = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        return names | {"AWS_DEFAULT_REGION": "us-east-1"}

    def make_bucket(self) -> str:
        """The URL of a folder in it. A bucket of its own: fsspec keeps one file system a URL's options."""
        fsspec.filesystem("s3").clear_instance_cache()
        bucket = f"b{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(bucket)
        return f"s3://{bucket}/files"

    def stop(self) -> None:
        """It is there and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
