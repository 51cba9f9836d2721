"""Which files of a shared registry may be deleted, and when: leases of uploads, marks of deletions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from prefix_store import redis_keys as keys
from prefix_store.entries import file_entry
from prefix_store.errors import UnavailableError
from prefix_store.redis_scripts import LEASE, MARK_DROPPING, UNMARK_DROPPING
from prefix_store.redis_server import RedisServer

LEASE_S = 600.0
MARK_S = 60.0
DROP_S = 5.0
POLL_S = 0.05


class RedisFiles:
    """A file is deleted by one process while others upload the same content. Why no version refers to a file that was
    deleted under it:

    1. An upload holds a lease of the file from before it stores it until its change is committed: `LEASE`, then the
       file, then `COMMIT`, which writes nothing unless the lease is still there. Then the upload leases and stores it
       anew.
    2. `COMMIT` lists the file in ENTRIES in the same script that looked at the lease, and a later one takes it from
       there with the last version that has it. So from the lease to the end of the last version there is a lease or an
       entry at every moment.
    3. `MARK_DROPPING` sets no mark while there is a lease or an entry, and `LEASE` gives no lease while there is a
       mark. So from the lease to the end of the last version there is no mark; one from before has expired, or was
       taken away by whoever set it, after the file was deleted.
    4. A file is deleted only by whoever set its mark, and within `DROP_S` of asking for it, by its own clock. A mark
       lasts `MARK_S`, so nobody deletes a file whose mark has expired, as long as no process sleeps for `MARK_S -
       DROP_S` between looking at its clock and deleting.

    A process killed while it deletes leaves a mark, for whose end an upload of this very content waits, and one killed
    while it uploads a lease that ends by itself and a file that the next start's sweep deletes.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._lease = server.script(LEASE)
        self._mark = server.script(MARK_DROPPING)
        self._unmark = server.script(UNMARK_DROPPING)

    def acquire(self, tenant: str, digest: str) -> str:
        """The lease's token. Waits while the file is being deleted. Raises UnavailableError after `MARK_S`."""
        token = uuid.uuid4().hex
        ends_s = time.monotonic() + MARK_S + DROP_S
        lease_keys = [keys.leases(tenant, digest), keys.dropping(tenant, digest)]
        while True:
            with self._server.answering() as client:
                if self._lease(keys=lease_keys, args=[token, int(LEASE_S * 1000)], client=client):
                    return token
            if time.monotonic() > ends_s:
                raise UnavailableError(f"the file of {digest[:12]} is being deleted, for more than {MARK_S:.0f} s")
            time.sleep(POLL_S)

    def release(self, tenant: str, digest: str, token: str) -> None:
        with suppress(UnavailableError), self._server.answering() as client:  # it ends by itself
            client.hdel(keys.leases(tenant, digest), token)

    def drop_unused(self, tenant: str, digest: str, drop: Callable[[str], None]) -> None:
        """Where `drop` fails the mark stays, for the file may be gone a little later."""
        token = uuid.uuid4().hex
        entry = file_entry(tenant, digest)
        mark = keys.dropping(tenant, digest)
        asked_s = time.monotonic()
        with self._server.answering() as client:
            is_marked = self._mark(
                keys=[keys.ENTRIES, keys.leases(tenant, digest), mark],
                args=[f"[{entry} ", f"({entry}!", token, int(MARK_S * 1000)],
                client=client,
            )
        if is_marked and time.monotonic() - asked_s < DROP_S:
            drop(digest)
            with suppress(UnavailableError), self._server.answering() as client:  # it expires by itself
                self._unmark(keys=[mark], args=[token], client=client)
