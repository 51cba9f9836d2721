"""A contender in a process of its own, which computes only while it is asked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from contenders import Contender
from workloads import Workload

ANSWER_S = 1800


class DeclinedError(Exception):
    """The contender cannot do it; the text says why."""


@dataclass(frozen=True)
class _Call:
    name: Literal["prepare", "run"]
    workload: Workload


@dataclass(frozen=True)
class _Reply:
    found: str | float = ""
    error: str | None = None


class Child:
    """`make` builds the contender in the child, at its first workload."""

    def __init__(self, make: Callable[[], Contender]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self, workload: Workload) -> str:
        """In what it will differ from what is asked. Raises DeclinedError."""
        return str(self._ask(_Call("prepare", workload)))

    def run(self, workload: Workload) -> float:
        """The figure, in the workload's unit. Raises DeclinedError."""
        return float(self._ask(_Call("run", workload)))

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _ask(self, call: _Call) -> str | float:
        try:
            self._pipe.send(call)
            if not self._pipe.poll(ANSWER_S):
                raise DeclinedError(f"no answer in {ANSWER_S} s")
            reply: _Reply = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise DeclinedError("its process is gone") from error
        if reply.error is not None:
            raise DeclinedError(reply.error)
        return reply.found


def _answer(make: Callable[[], Contender], pipe: Connection) -> None:
    contender = None
    while True:
        try:
            call: _Call = pipe.recv()
        except EOFError:
            return
        try:
            contender = contender or make()
            reply = _Reply(getattr(contender, call.name)(call.workload))
        except ModuleNotFoundError as error:
            reply = _Reply(error=f"{error.name} is not installed")
        except Exception as error:  # whatever it is, it is this row's: the others go on
            reply = _Reply(error=f"{type(error).__name__}: {str(error)[:200]}")
        pipe.send(reply)
