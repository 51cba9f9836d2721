"""What dashboards see. Names and buckets are vLLM's where it has one, under `prefixserve_`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

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


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"prefixserve_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"prefixserve_{name}", text, buckets=buckets, registry=self.registry)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens of finished requests.")
        self._started = counter("request_admitted", "Requests admitted to the queue.")
        self._success = counter("request_success", "Finished requests.", ("finished_reason",))
        self._rejected = counter("request_rejected", "Requests refused before they ran.", ("reason",))
        self._aborted = counter("request_aborted", "Requests aborted by their caller.")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._inter_token = histogram("inter_token_latency_seconds", "Token to token.", INTER_TOKEN_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self._queue_time = histogram("request_queue_time_seconds", "Arrival to admission.", REQUEST_BUCKETS)

    def request_started(self) -> None:
        self._started.inc()

    def tokens(self, num_prompt: int, num_generated: int) -> None:
        self._prompt_tokens.inc(num_prompt)
        self._generation_tokens.inc(num_generated)

    def ttft(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def e2e(self, seconds: float) -> None:
        self._e2e.observe(seconds)

    def queue_time(self, seconds: float) -> None:
        self._queue_time.observe(seconds)

    def request_finished(self, reason: str) -> None:
        self._success.labels(reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def aborted(self) -> None:
        self._aborted.inc()
