"""The threads in which texts are tokenised: tenants take turns, and long texts have a thread of their own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from server.engine.errors import EngineError
from server.engine.fair_queue import FairQueue
from server.engine.tenant_policy import TenantPolicies
from server.engine.threads import workers

LONG_TEXT = 32 * 1024  # characters; tokenising such a text takes some tens of milliseconds
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Text:
    """What one tenant waits for. `work` tokenises `num_characters`."""

    tenant_id: str
    num_characters: int
    work: Callable[[], Any]
    future: Future[Any]


class TextLanes:
    """A lane for short texts and one for long ones: a long text keeps no short one waiting."""

    def __init__(self, policies: TenantPolicies) -> None:
        self._short = Lane(policies, "tokenise", is_long=False)
        self._long = Lane(policies, "tokenise-long", is_long=True)

    def submit(self, tenant_id: str, num_characters: int, work: Callable[[], T]) -> Future[T]:
        """Run `work` in its lane when it is the tenant's turn. A future that is cancelled before is passed over."""
        future: Future[T] = Future()
        lane = self._long if num_characters > LONG_TEXT else self._short
        lane.put(Text(tenant_id, num_characters, work, future))
        return future

    def shutdown(self) -> None:
        for lane in (self._short, self._long):
            lane.shutdown()


class Lane:
    """One thread, and the texts that wait for it. The turn is with the tenant that has had the fewest characters
    tokenised, by weight. After a long text memory is given back.

    The thread has the priority of all others: one of a lower priority that holds Python's lock would stop the server.
    """

    def __init__(self, policies: TenantPolicies, name: str, *, is_long: bool) -> None:
        self._waiting: FairQueue[Text] = FairQueue(policies)
        self._lock = threading.Lock()
        self._worker = workers(1, name)
        self._is_long = is_long

    def put(self, text: Text) -> None:
        with self._lock:
            self._waiting.append(text)
        self._worker.submit(self._run_next)

    def shutdown(self) -> None:
        with self._lock:
            for text in self._waiting:
                text.future.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _run_next(self) -> None:
        with self._lock:
            text = next(self._waiting.in_turn({}))
            self._waiting.remove(text)
            is_wanted = text.future.set_running_or_notify_cancel()
            if is_wanted:
                self._waiting.charge_input(text.tenant_id, text.num_characters)
        if not is_wanted:
            return
        try:
            found = text.work()
        except Exception as error:  # it is raised where the caller waits
            if isinstance(error, EngineError):
                error.__traceback__ = None  # its frames hold all tokens of a text that was refused
            text.future.set_exception(error)
        else:
            text.future.set_result(found)
        if self._is_long:
            give_memory_back()


def give_memory_back() -> None:
    """Hand freed memory to the system: glibc keeps hundreds of megabytes after a long text."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
