"""What dashboards see. Names and buckets are vLLM's where it has one, under `prefixserve_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prefix_store.registry import TaskCounts
    from server.engine.engine_stats import EngineStats

MAX_TASK_LABELS = 50
ResidentBytes = Callable[[], dict[tuple[str, str], int]]  # by tenant and task

FINE = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TTFT_BUCKETS = (*FINE, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
INTER_TOKEN_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
COARSE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
REQUEST_BUCKETS = (*COARSE, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
FINISHED = {"eos_token": "stop", "stop_sequence": "stop"}  # vLLM's reasons; the others read the same


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"prefixserve_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"prefixserve_{name}", text, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"prefixserve_{name}", text, registry=self.registry)

        self._tasks = gauge("tasks", "Tasks of all tenants.")
        self._tasks_incompatible = gauge("tasks_incompatible", "Of these, stored for another model: they answer 409.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._prompt_tokens_cached = counter("prompt_tokens_cached", "Of these, reused from earlier text.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens of finished requests.")
        self._started = counter("request_admitted", "Requests admitted to the queue.")
        self._success = counter("request_success", "Finished requests.", ("finished_reason",))
        self._rejected = counter("request_rejected", "Requests refused before they ran.", ("reason",))
        self._aborted = counter("request_aborted", "Requests aborted by their caller.")
        self._quarantined = counter("version_quarantined", "Versions taken out of service for their faults.")
        self._connections = Gauge("prefixserve_connections", "Open connections.", registry=self.registry)
        self._connections_refused = counter(
            "connections_refused",
            "Connections whose peer was gone, that were refused (peer, full, descriptors), or given up (idle).",
            ("reason",),
        )
        self._gone = self._connections_refused.labels("gone")  # thousands a second, in a storm
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._inter_token = histogram("inter_token_latency_seconds", "Token to token.", INTER_TOKEN_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self._prompt_lengths = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._generation_lengths = histogram(
            "request_generation_tokens", "Generated tokens of a request.", TOKEN_BUCKETS
        )
        self._queue_time = histogram("request_queue_time_seconds", "Arrival to admission.", REQUEST_BUCKETS)

    def tasks(self, counts: TaskCounts) -> None:
        self._tasks.set(counts.num_tasks)
        self._tasks_incompatible.set(counts.num_incompatible)

    def request_started(self) -> None:
        self._started.inc()

    def tokens(self, num_prompt: int, num_cached: int, num_generated: int) -> None:
        self._prompt_tokens.inc(num_prompt)
        self._prompt_tokens_cached.inc(num_cached)
        self._generation_tokens.inc(num_generated)
        self._prompt_lengths.observe(num_prompt)
        self._generation_lengths.observe(num_generated)

    def ttft(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def e2e(self, seconds: float) -> None:
        self._e2e.observe(seconds)

    def queue_time(self, seconds: float) -> None:
        self._queue_time.observe(seconds)

    def request_finished(self, reason: str) -> None:
        self._success.labels(FINISHED.get(reason, reason)).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def connection_refused(self, reason: str) -> None:
        self._connections_refused.labels(reason).inc()

    def connection_gone(self) -> None:
        self._gone.inc()

    def watch_connections(self, num_open: Callable[[], int]) -> None:
        """Read the count of open connections at every scrape."""
        self._connections.set_function(num_open)

    def aborted(self) -> None:
        self._aborted.inc()

    def quarantined(self) -> None:
        self._quarantined.inc()

    def watch(self, stats: Callable[[], EngineStats], resident_bytes_by_task: ResidentBytes) -> None:
        """Read the engine's own counts at every scrape."""
        self.registry.register(EngineCollector(stats, resident_bytes_by_task))


class EngineCollector(Collector):
    """What the engine counts itself has its home there; a scrape reads it."""

    def __init__(self, stats: Callable[[], EngineStats], resident_bytes_by_task: ResidentBytes) -> None:
        self._stats = stats
        self._resident_bytes_by_task = resident_bytes_by_task

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        kv_usage = stats.kv_blocks_used / max(stats.kv_blocks_total, 1)
        gauges = {
            "num_requests_running": ("Requests in the batch, of an ensemble with all its rows.", stats.num_running),
            "num_requests_waiting": ("Requests that wait for a place, their prefix or KV memory.", stats.num_waiting),
            "kv_cache_usage_perc": ("KV memory of the rows' text in use, 0 to 1.", kv_usage),
            "kv_blocks_cached": ("Blocks of text that no row holds and that may come again.", stats.kv_blocks_cached),
            "prefix_resident": ("Prefixes in device memory.", stats.num_resident),
            "prefix_pinned": ("Of them, in use or pinned by the operator.", stats.num_pinned),
            "prefix_resident_bytes": ("Device memory that resident prefixes use.", stats.prefix_bytes_used),
            "prefix_pool_bytes": ("Device memory for resident prefixes.", stats.prefix_bytes_total),
            "service_skew": ("Weighted tokens by which tenants that wait are served apart.", stats.service_skew),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"prefixserve_{name}", text, value)
        blocks = [str(stats.block_size), str(stats.kv_blocks_total)]
        config = GaugeMetricFamily(
            "prefixserve_cache_config_info", "How KV memory is cut.", labels=["block_size", "num_gpu_blocks"]
        )
        config.add_metric(blocks, 1)
        yield config
        counts = stats.residency
        counters = {
            "num_preemptions": ("Rows that gave up their place for want of KV memory.", stats.num_preemptions),
            "prefix_hits": ("Requests whose prefix was resident or on its way.", counts.num_hits),
            "prefix_misses": ("Requests whose prefix was cold.", counts.num_misses),
            "prefix_loads": ("Prefixes made resident.", counts.num_loads),
            "prefix_load_failures": ("Prefixes that could not be made resident.", counts.num_failed_loads),
            "prefix_evictions": ("Prefixes dropped from device memory.", counts.num_evictions),
            "prefix_thrash": ("Loads of prefixes evicted for want of room within the last minute.", counts.num_thrash),
            "prefix_load_seconds": ("Seconds spent making prefixes resident.", counts.load_s),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"prefixserve_{name}", text, value)
        by_task = GaugeMetricFamily(
            "prefixserve_task_resident_bytes",
            "Device memory of the largest tasks.",
            labels=["tenant", "task"],
        )
        ranked = sorted(self._resident_bytes_by_task().items(), key=lambda item: (-item[1], item[0]))
        for owner, num_bytes in ranked[:MAX_TASK_LABELS]:
            by_task.add_metric(owner, num_bytes)
        if len(ranked) > MAX_TASK_LABELS:
            by_task.add_metric(["_other", "_other"], sum(num_bytes for _, num_bytes in ranked[MAX_TASK_LABELS:]))
        yield by_task
