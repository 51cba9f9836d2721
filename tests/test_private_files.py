"""What a server keeps is for its user's eyes alone, and a key that others may read is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from prefix_store.blobs import Blobs
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.tenants import new_tenant
from server import key_file
from server.data_folder import close_folder, is_served, serving
from server.errors import StartError
from server.key_file import read_operator_key
from tests.conftest import OPERATOR_KEY, write_key
from tests.program import ROOT

SOMEBODY = 4321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def check_private(root: Path) -> None:
    found = {path: mode(path) for path in (root, *root.rglob("*"))}
    assert all(each == (0o700 if path.is_dir() else 0o600) for path, each in found.items()), found


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """A registry that is open, so that SQLite's own files are there, and a blob."""
    registry = SqliteRegistry(folder / "registry.sqlite")
    registry.update_tenant("north", lambda _: new_tenant("north"))
    Blobs(folder / "blobs").put("north", b"content")
    assert {"registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"} < {path.name for path in folder.iterdir()}
    yield
    registry.close()


@pytest.mark.usefixtures("umask")
def test_registry_and_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "data"
    with filled(folder), serving(folder):
        check_private(tmp_path / "above")


@pytest.mark.usefixtures("umask")
def test_what_was_open_to_others_is_closed_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with filled(folder):
        (folder / "residents.json").touch()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        with capture_logs() as logs:
            close_folder(folder)
        assert logs == []
        check_private(folder)


def test_a_folder_with_other_things_in_it_keeps_its_own_mode(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with filled(folder):
        (folder / "letter.txt").touch(0o644)
        folder.chmod(0o755)
        close_folder(folder)
    assert (mode(folder), mode(folder / "letter.txt")) == (0o755, 0o644)
    assert mode(folder / "registry.sqlite") == 0o600


@needs_root
def test_what_cannot_be_closed_is_told(tmp_path: Path) -> None:
    with filled(tmp_path / "data"):
        pass
    foreign = tmp_path / "data" / "residents.json"
    foreign.touch()
    foreign.chmod(0o644)
    os.chown(foreign, SOMEBODY, -1)
    with capture_logs() as logs:
        close_folder(tmp_path / "data")
    assert [(each["event"], each["path"], each["mode"]) for each in logs] == [("open_to_others", str(foreign), "0644")]


@pytest.mark.parametrize("given", [0o640, 0o604, 0o644, 0o660, 0o666, 0o620, 0o602, 0o444, 0o440])
def test_a_key_that_others_may_read_or_change_is_refused(tmp_path: Path, given: int) -> None:
    path = write_key(tmp_path / "operator.key", OPERATOR_KEY)
    path.chmod(given)
    with pytest.raises(StartError, match=rf"mode {given:04o}.*`chmod 600 {path}`") as caught:
        read_operator_key(path)
    assert OPERATOR_KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [0o600, 0o400, 0o700])
def test_a_key_of_ones_own_is_read(tmp_path: Path, given: int) -> None:
    path = write_key(tmp_path / "operator.key", OPERATOR_KEY)
    path.chmod(given)
    (tmp_path / "link").symlink_to(path)
    assert read_operator_key(path) == read_operator_key(tmp_path / "link") == OPERATOR_KEY


@needs_root
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write_key(tmp_path / "operator.key", OPERATOR_KEY)
    os.chown(path, SOMEBODY, -1)
    with pytest.raises(StartError, match=f"owned by uid {SOMEBODY}"):
        read_operator_key(path)


@needs_root
@pytest.mark.parametrize(("given", "is_read"), [(0o440, True), (0o640, True), (0o644, False), (0o660, False)])
def test_a_user_reads_roots_key_through_a_group(tmp_path: Path, given: int, is_read: bool) -> None:
    """As Kubernetes mounts a secret with `fsGroup`."""
    path = write_key(tmp_path / "operator.key", OPERATOR_KEY)
    path.chmod(given)
    os.chown(path, 0, SOMEBODY)
    tmp_path.chmod(0o711)
    program = f"""
import os, sys
from server.key_file import *
os.chdir({str(tmp_path)!r})
os.setgid({SOMEBODY})
os.setuid({SOMEBODY})
print(read_operator_key(Path("operator.key")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (OPERATOR_KEY in done.stdout) is is_read, done.stderr
    assert is_read or f"mode {given:04o}" in done.stderr


@needs_root
@pytest.mark.parametrize(("given", "is_read"), [(0o444, True), (0o400, True), (0o600, True), (0o446, False)])
def test_a_containers_secret_is_read_as_it_is_mounted(
    tmp_path: Path, given: int, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "SECRETS", (tmp_path / "secrets",))
    (tmp_path / "secrets").mkdir()
    path = write_key(tmp_path / "secrets" / "operator_key", OPERATOR_KEY)
    path.chmod(given)
    if is_read:
        assert read_operator_key(path) == OPERATOR_KEY
    else:
        with pytest.raises(StartError, match=f"mode {given:04o}"):
            read_operator_key(path)
    os.chown(path, SOMEBODY, -1)
    with pytest.raises(StartError, match=f"owned by uid {SOMEBODY}"):
        read_operator_key(path)


def test_a_folder_is_served_while_its_server_runs(tmp_path: Path) -> None:
    assert not is_served(tmp_path)
    with serving(tmp_path):
        with serving(tmp_path):
            assert is_served(tmp_path)
        assert is_served(tmp_path)
    assert not is_served(tmp_path)
