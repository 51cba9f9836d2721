"""A new version's file while the registry decides on it."""

from __future__ import annotations

from prefix_store.blobs import Blobs


class Upload:
    """`put` may be called several times: `NewFile`. `is_stored`: the file was missing or damaged before the first call,
    whatever the registry says of it."""

    def __init__(self, blobs: Blobs, tenant: str, body: bytes) -> None:
        self._blobs = blobs
        self._tenant = tenant
        self._body = body
        self._was_put = False
        self.is_stored = False

    def put(self) -> None:
        """Store the file where it is not there as it should be. Later calls look at its size alone, as they keep others
        waiting."""
        if not self._was_put:
            self.is_stored = not self._blobs.holds(self._tenant, self._body)
        self._blobs.put(self._tenant, self._body, was_whole=self._was_put or not self.is_stored)
        self._was_put = True
