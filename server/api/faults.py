"""Run-time faults of versions: one that fails again and again is taken out of service."""

from __future__ import annotations

from collections import OrderedDict, deque

from prefix_store.task import Version

MAX_FAULTS = 3
WINDOW_S = 60.0
MAX_WATCHED = 4096  # versions that failed lately


class FaultWatch:
    """Counts by tenant, task and version."""

    def __init__(self) -> None:
        self._faults_at_s: OrderedDict[tuple[str, str, int], deque[float]] = OrderedDict()

    def add(self, version: Version, now_s: float) -> bool:
        """Whether that is the third within 60 s. The count then begins anew."""
        key = (version.tenant, version.task, version.version)
        faults = self._faults_at_s.setdefault(key, deque(maxlen=MAX_FAULTS))
        self._faults_at_s.move_to_end(key)
        faults.append(now_s)
        if len(self._faults_at_s) > MAX_WATCHED:
            self._faults_at_s.popitem(last=False)
        if len(faults) < MAX_FAULTS or now_s - faults[0] > WINDOW_S:
            return False
        del self._faults_at_s[key]
        return True

    def forget(self, version: Version) -> None:
        """Count anew: what the version failed of was repaired."""
        self._faults_at_s.pop((version.tenant, version.task, version.version), None)
