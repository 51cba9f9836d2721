"""On what a figure was taken: processor, memory, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "openvino-genai", "numpy")
NATIVE = {"bf16": ("avx512_bf16", "amx_bf16"), "VNNI": ("avx512_vnni", "avx_vnni"), "AMX int8": ("amx_int8",)}


@dataclass(frozen=True)
class Taken:
    date: str
    commit: str
    processor: str
    num_cores: int
    memory_gib: int
    native: list[str]  # of what the processor multiplies by itself
    versions: dict[str, str]
    is_quick: bool  # a smoke run: its figures mean nothing


def taken_now(is_quick: bool) -> Taken:
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    return Taken(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        processor=cpu.get("model name", "unknown"),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        native=[name for name, any_of in NATIVE.items() if flags.intersection(any_of)],
        versions={name: found for name in PACKAGES if (found := _version(name))},
        is_quick=is_quick,
    )


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text().partition("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _commit() -> str:
    """Of the checkout, with a plus where the program's files differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "server", "prefix_store", "load_tests") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
