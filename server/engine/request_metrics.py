"""What the outputs of requests tell dashboards: how long they waited, at what pace they came, how they ended."""

from __future__ import annotations

from server.engine.engine import StepOutput
from server.engine.errors import OverloadedError, QueueTimeoutError, TenantQueueTimeoutError
from server.metrics import Metrics

REJECTED = {
    QueueTimeoutError: "queue_time",
    TenantQueueTimeoutError: "tenant_queue_time",
    OverloadedError: "pinned_room",
}


class RequestMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tokens_at_s: dict[str, float] = {}  # request -> when its last token came

    def observe(self, output: StepOutput, now: float) -> None:
        sequence = output.sequence
        if output.error is not None or output.token is None:
            reason = next((reason for kind, reason in REJECTED.items() if isinstance(output.error, kind)), None)
            if reason is not None:
                self._metrics.rejected(reason)
            self._metrics.request_finished("error")
            return
        previous_s = self._tokens_at_s.get(sequence.request_id)
        self._tokens_at_s[sequence.request_id] = now
        if previous_s is None:
            self._metrics.ttft(now - sequence.arrival_s)
            if sequence.started_s is not None:
                self._metrics.queue_time(sequence.started_s - sequence.arrival_s)
        else:
            self._metrics.inter_token(now - previous_s)
        if output.token.finish_reason is not None:
            self._metrics.tokens(sequence.num_prompt_tokens, sequence.num_cached_tokens, sequence.num_generated_tokens)
            self._metrics.e2e(now - sequence.arrival_s)
            self._metrics.request_finished(output.token.finish_reason)

    def forget(self, request_id: str) -> None:
        self._tokens_at_s.pop(request_id, None)
