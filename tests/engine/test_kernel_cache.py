"""The compiled kernels are run from where nobody else can have put them, and from nowhere else."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from server.engine import cpu_kernels
from server.engine.cpu_kernels import load_kernels

SOMEBODY = 4321
CODE = b"\x7fELF" + b"planted" * 100
PLANTED = CODE + hashlib.sha256(CODE).digest()  # whoever writes a library can also write its digest
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def compiled_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "FLAGS", ("-O0", "-march=native", "-fopenmp", "-fPIC"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's cache, with a library in it that is not what was compiled: whoever runs it crashes."""
    found = tmp_path / "cache" / "kernels"
    assert load_kernels(found) is not None
    (library,) = found.iterdir()
    library.unlink()  # not changed in place: this process has it loaded
    library.write_bytes(PLANTED)
    library.chmod(0o600)
    return found


def opened(folder: Path) -> str:
    folder.chmod(0o777)
    return f"{folder} has mode 0777"


def opened_to_a_group(folder: Path) -> str:
    folder.chmod(0o770)
    return f"{folder} has mode 0770"


def shared(folder: Path) -> str:
    folder.chmod(0o1777)
    return f"{folder} has mode 1777"


def opened_above(folder: Path) -> str:
    folder.parent.chmod(0o777)
    return f"{folder.parent} has mode 0777"


def given_away(folder: Path) -> str:
    os.chown(folder, SOMEBODY, -1)
    return f"{folder} has mode 0700 and is owned by uid {SOMEBODY}"


def behind_a_link(folder: Path) -> str:
    elsewhere = folder.parent.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.rename(elsewhere / "kernels")
    folder.symlink_to(elsewhere / "kernels")
    elsewhere.chmod(0o777)
    return f"{elsewhere} has mode 0777"


@pytest.mark.parametrize(
    "spoil",
    [
        opened,
        opened_to_a_group,
        shared,
        opened_above,
        behind_a_link,
        pytest.param(given_away, marks=needs_root),
    ],
)
def test_a_folder_that_others_may_write_is_neither_run_nor_filled(folder: Path, spoil: Callable[[Path], str]) -> None:
    reason = spoil(folder)
    with capture_logs() as logs:
        kernels = load_kernels(folder)
    assert kernels is not None
    assert kernels.argmax(torch.tensor([[1.0, 3.0, 2.0]])) == [1]
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("cpu_kernels_not_kept", "warning")
    assert reason in entry["reason"]
    assert "chmod go-w" in entry["reason"] or "chown" in entry["reason"]
    assert [path.read_bytes() for path in folder.iterdir()] == [PLANTED]


@pytest.mark.parametrize(
    "spoil", ["mode", pytest.param("owner", marks=needs_root), pytest.param("link", marks=needs_root)]
)
def test_a_library_that_others_may_write_is_compiled_again(folder: Path, spoil: str, tmp_path: Path) -> None:
    (library,) = folder.iterdir()
    if spoil == "link":
        library.rename(tmp_path / "planted.so")
        library.symlink_to(tmp_path / "planted.so")
    if spoil == "mode":
        library.chmod(0o666)
    else:
        os.chown(library, SOMEBODY, -1)
    assert load_kernels(folder) is not None
    found = library.lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
    assert library.read_bytes() != PLANTED


def test_where_temporary_files_are_open_too_there_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_too = folder.parent / "tmp"
    open_too.mkdir()
    open_too.chmod(0o777)
    opened(folder)
    monkeypatch.setattr("tempfile.tempdir", str(open_too))
    with capture_logs() as logs:
        assert load_kernels(folder) is None
    assert [entry["event"] for entry in logs] == ["cpu_kernels_not_kept", "cpu_kernels_missing"]
    assert str(open_too) in logs[1]["reason"]


def test_the_cache_is_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert load_kernels(tmp_path / "a" / "b" / "kernels") is not None
    finally:
        os.umask(before)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700] * 3
    (library,) = (tmp_path / "a" / "b" / "kernels").iterdir()
    assert stat.S_IMODE(library.stat().st_mode) == 0o600
