"""A real redis-server on a free port, its files in a folder, every write on the disk before it is answered."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


class RedisProcess:
    """Started, killed and started again on the same port with the same files.

    With a `password` it is on TLS alone, with the `certificate` (and its key) for localhost that `ca` signed.
    """

    def __init__(
        self, folder: Path, *, password: str = "", certificate: Path | None = None, ca: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "loglevel": "warning"}
        self._options |= {"appendonly": "yes", "appendfsync": "always", "auto-aof-rewrite-percentage": 0}
        self.url = f"redis://127.0.0.1:{port}/0"
        if password:
            self._options |= {"port": 0, "tls-port": port, "tls-auth-clients": "no", "requirepass": password}
            self._options |= {"tls-cert-file": certificate, "tls-key-file": certificate, "tls-ca-cert-file": ca}
            self.url = f"rediss://:{password}@localhost:{port}/0?ssl_ca_certs={ca}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "the tests need redis-server: make test installs it"
        command = [program, *(str(part) for name, value in self._options.items() for part in (f"--{name}", value))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, "redis-server did not start"
                    assert time.monotonic() < deadline_s, "redis-server did not start in time"
                    time.sleep(0.02)

    def client(self) -> redis.Redis:
        retry = Retry(NoBackoff(), 0)
        return redis.Redis.from_url(self.url, decode_responses=True, protocol=2, socket_timeout=5, retry=retry)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """It is there and answers nothing."""
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None
