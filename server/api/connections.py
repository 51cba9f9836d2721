"""How many connections are open, in all and by peer, and which of them are given up for others."""

from __future__ import annotations

import ipaddress
import os
import resource
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import structlog

from server.config import Settings
from server.metrics import Metrics

RESERVED_FILES = 64  # descriptors for files and registries, beside those that are open at the start
DEFAULT_PER_PEER = 512
MIN_IDLE_S = 0.1  # a request may be on its way
SHORT_S = 10.0  # for how long a lack of connections is told of, and how often it is logged
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
log = structlog.get_logger()


class Connections:
    """Counts connections, and knows those that wait for their next request. A peer is an IPv4 address or an IPv6
    network of 64 bits."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._max_per_peer = settings.max_connections_per_peer
        self._trusted: tuple[Network, ...] = tuple(ipaddress.ip_network(each) for each in settings.trusted_proxy)
        self.max_open = min(settings.max_connections, max_by_descriptors())
        self.by_peer: Counter[str] = Counter()
        self._most: dict[str, int | None] = {}
        self.num_open = 0
        self._idle: OrderedDict[object, tuple[float, Callable[[], None]]] = OrderedDict()  # since when
        self._short_s = self._logged_s = time.monotonic() - SHORT_S
        self._num_short = 0
        metrics.watch_connections(lambda: self.num_open)

    @property
    def is_short(self) -> bool:
        """Whether a connection was refused, or given up for another, for want of room in the last seconds."""
        return time.monotonic() - self._short_s < SHORT_S

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.max_open

    def allows(self, peer: str) -> bool:
        """Whether this peer may have one more connection."""
        num_open = self.by_peer[peer]
        if num_open < (self._max_per_peer or DEFAULT_PER_PEER):
            return True
        if peer not in self._most:  # it has many, so it is asked for often
            self._most[peer] = self.max_of(peer)
        most = self._most[peer]
        return most is None or num_open < most

    def max_of(self, peer: str) -> int | None:
        """How many connections this peer may have; None: as many as there are."""
        network = ipaddress.ip_network(peer)
        if any(network.version == each.version and network.subnet_of(each) for each in self._trusted):  # type: ignore[arg-type]
            return None
        if self._max_per_peer is None and network.network_address.is_loopback:
            return None
        return self._max_per_peer or DEFAULT_PER_PEER

    def open(self, peer: str) -> None:
        self.num_open += 1
        self.by_peer[peer] += 1

    def close(self, peer: str) -> None:
        self.num_open -= 1
        self.by_peer[peer] -= 1
        if not self.by_peer[peer]:
            del self.by_peer[peer]
            self._most.pop(peer, None)

    def set_idle(self, connection: object, give_up: Callable[[], None]) -> None:
        """The connection waits for a request: `give_up` may be called to make room for others."""
        if connection not in self._idle:
            self._idle[connection] = (time.monotonic(), give_up)

    def set_busy(self, connection: object) -> None:
        """The connection has a request, or is closed."""
        self._idle.pop(connection, None)

    def make_room(self, reason: str) -> bool:
        """Give up the connection that has been idle longest; its descriptor is free in the loop's next round. False:
        no connection has been idle for long. Calls are logged once in `SHORT_S`."""
        now_s = time.monotonic()
        self._num_short += 1
        if now_s - self._logged_s >= SHORT_S:
            log.warning(
                "connections_short", reason=reason, open=self.num_open, most=self.max_open, times=self._num_short
            )
            self._num_short, self._logged_s = 0, now_s
        self._short_s = now_s
        connection, (since_s, give_up) = next(iter(self._idle.items()), (None, (now_s, None)))
        if give_up is None or now_s - since_s < MIN_IDLE_S:
            return False
        self.set_busy(connection)
        give_up()
        self.refused("idle")
        return True

    def refused(self, reason: str) -> None:
        self._metrics.connection_refused(reason)

    def dropped(self) -> None:
        """One whose peer was gone before anything was done."""
        self._metrics.connection_gone()


def peer_of(host: str) -> str:
    """The peer that counts for an address as the system gives it."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None or address.is_loopback:
        return str(address.ipv4_mapped or address)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def max_by_descriptors() -> int:
    """As many connections as leave descriptors for files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    room = max(2, limit - len(os.listdir("/dev/fd")))
    return room - min(RESERVED_FILES, room // 2)
