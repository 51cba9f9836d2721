"""The engine behind asyncio: one thread runs the steps, coroutines ask and listen."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import structlog

from prefix_store.prefix import Layout, ModelShape, Prefix
from server.engine.chat_template import Messages, characters_in
from server.engine.context_limits import check_context, check_vocabulary, max_new_tokens
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, StepOutput
from server.engine.engine_stats import EngineStats, stats_of
from server.engine.errors import GenerationError, OverloadedError, PrefixFaultError
from server.engine.kv_blocks import block_bytes, prefix_blocks
from server.engine.prompt_tokenizer import ControlTokens, PromptTokenizer
from server.engine.queue_places import QueuePlaces
from server.engine.request_metrics import RequestMetrics
from server.engine.request_stream import RequestStream
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from server.engine.step_threads import StepThreads
from server.engine.tenant_policy import TenantPolicy
from server.engine.text_lanes import LONG_TEXT, TextLanes
from server.engine.threads import workers
from server.metrics import Metrics

HEARTBEAT_S = 10.0
MAX_LONG_TEXTS = 16  # that wait to be tokenised
NUM_WORKERS = 32  # threads for what would block the event loop; look-ups pass while some wait for a hanging registry
T = TypeVar("T")
log = structlog.get_logger()


class AsyncEngine:
    """Owns the thread in which the engine lives. Every public coroutine may be called from the event loop only.

    The bounds of the queue are checked before a prompt is tokenised, on an estimate of its tokens from its characters.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        metrics: Metrics,
        *,
        max_queued: int = 256,
        max_queued_tokens: int = 262_144,
        control_tokens: ControlTokens = "allow",
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self._prompts = PromptTokenizer(tokenizer, control_tokens)
        self._metrics = metrics
        self._places = QueuePlaces(engine.policies, metrics, max_queued=max_queued, max_queued_tokens=max_queued_tokens)
        self._long_texts = QueuePlaces(
            engine.policies,
            metrics,
            max_queued=MAX_LONG_TEXTS,
            max_queued_tokens=MAX_LONG_TEXTS * self.max_context,
            name="the queue of long texts",
        )
        self._text_ids = itertools.count()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._request_metrics = RequestMetrics(metrics)
        self._lanes = TextLanes(engine.policies)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat_s = time.monotonic()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def shape(self) -> ModelShape:
        return self._engine.runner.shape

    @property
    def max_context(self) -> int:
        """Positions a row may use, virtual tokens included."""
        return self.shape.max_positions

    @property
    def is_healthy(self) -> bool:
        """The step loop is alive and went round within 10 s."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and time.monotonic() - self._beat_s < HEARTBEAT_S

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(workers(NUM_WORKERS, "worker"))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def shutdown(self, drain: bool = True) -> None:
        """Refuse new work; with `drain` wait for what runs, else fail it; stop the thread."""
        self._is_draining = True
        if drain:
            await self._idle.wait()
        for stream in tuple(self._streams.values()):
            stream.fail(GenerationError("the server is stopping"))
        self._calls.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._lanes.shutdown()

    async def generate(
        self,
        prompt: str | list[int],
        sampling_params: SamplingParams,
        members: tuple[Composition, ...],
        request_id: str,
        tenant_id: str,
    ) -> RequestStream:
        """Admit a request of one row a member. Raises as `tokenise`, TenantQueueFullError or OverloadedError,
        UnknownTokenError or PromptTooLongError."""
        if self._is_draining:
            self._metrics.rejected("draining")
            raise OverloadedError("the server is stopping")
        if isinstance(prompt, list):
            token_ids = prompt
        else:
            token_ids = await self.tokenise(prompt, members, sampling_params.max_new_tokens, tenant_id)
        # Nothing waits between a text's place and this one.
        self._places.take(request_id, tenant_id, min(len(token_ids), self.max_context))
        try:
            start_ids = self._engine.runner.decoder_start_ids
            for prefixes in members:
                check_context(self.shape, prefixes, len(token_ids), len(start_ids), sampling_params.max_new_tokens)
            check_vocabulary(self.shape, token_ids)
            detokenizer = Detokenizer(
                self.tokenizer, sampling_params.stop, sampling_params.include_stop, start_ids or token_ids
            )
            sequence = Sequence(request_id, token_ids, sampling_params, detokenizer, members, start_ids, tenant_id)
            stream = RequestStream(sequence, lambda: self._abort(request_id))
            self._engine.check_room(sequence)
        except BaseException:
            self._places.leave(request_id)
            raise
        self._streams[request_id] = stream
        self._idle.clear()
        self._metrics.request_started()
        self._calls.put(lambda: self._engine.add(sequence))
        return stream

    async def tokenise(
        self, text: str | Messages, members: tuple[Composition, ...], max_new_tokens: int, tenant_id: str
    ) -> list[int]:
        """The ids of a text, or of a conversation. Raises TenantQueueFullError or OverloadedError before any work,
        ContextLengthError as soon as it is known that they do not fit, ChatRefusedError.

        A short text has a place in the queue meanwhile. A long one has none: it may take seconds, and waits for its
        thread in a queue of its own.
        """
        num_start = len(self._engine.runner.decoder_start_ids)

        def check(num_tokens: int, is_least: bool) -> None:
            for prefixes in members:
                check_context(self.shape, prefixes, num_tokens, num_start, max_new_tokens, is_least=is_least)

        num_characters = characters_in(text)
        if isinstance(text, str):
            check(self._prompts.least_tokens(text), True)
            work = partial(self._prompts.ids, text, check)
        else:
            work = partial(self._prompts.chat_ids, text, check)
        num_tokens = min(num_characters // 4 + 1, self.max_context)
        places = self._places
        if self.takes_long(text):
            self._places.check(tenant_id, num_tokens)
            places = self._long_texts
        text_id = f"text {next(self._text_ids)}"
        places.take(text_id, tenant_id, num_tokens)
        try:
            return await asyncio.wrap_future(self._lanes.submit(tenant_id, num_characters, work))
        finally:
            places.leave(text_id)

    def takes_long(self, text: str | Messages) -> bool:
        """Whether to tokenise it may take seconds."""
        return characters_in(text) > LONG_TEXT

    @property
    def has_chat_template(self) -> bool:
        return self._prompts.has_chat_template

    def check_queue(self, tenant_id: str) -> None:
        """Raises as `generate` would before tokenising, for a caller that has work to do before it asks."""
        self._places.check(tenant_id, 0)

    def check_answers(self, num_answers: int, num_tokens: int) -> None:
        """Raises TooManyAnswersError for answers to a prompt of `num_tokens` that never find places together."""
        self._places.check_answers(num_answers, num_tokens)

    def max_new_tokens(self, members: tuple[Composition, ...], num_prompt_tokens: int) -> int:
        """How many tokens a request can generate; less than one if its prompt does not fit."""
        num_start = len(self._engine.runner.decoder_start_ids)
        return min(max_new_tokens(self.shape, prefixes, num_prompt_tokens, num_start) for prefixes in members)

    def set_policy(self, tenant_id: str, policy: TenantPolicy | None) -> None:
        """Effective at the next step. None: the default again."""
        self._engine.policies.set(tenant_id, policy)

    async def check(self, prefix: Prefix, tenant_id: str = "") -> None:
        """A trial forward on a few tokens, off the step loop, charged to the tenant. Raises PrefixFaultError if its
        logits are not finite."""
        needed = self.bytes_on_device(prefix.layout)
        available = self._engine.prefix_allocator.num_blocks * self._block_bytes
        if needed > available:
            raise PrefixFaultError(
                f"{prefix.num_virtual_tokens} virtual tokens need {needed} bytes of prefix memory, "
                f"the pool has {available}"
            )
        token_ids = [1 % self.shape.vocab_size, 2 % self.shape.vocab_size]
        num_tokens = prefix.num_virtual_tokens + len(token_ids)
        self._calls.put(lambda: self._engine.charge(tenant_id, num_tokens))
        await asyncio.to_thread(self._engine.runner.check, prefix, token_ids)

    def check_together(self, num_rows: int, num_bytes: int) -> None:
        """Could rows behind prefixes of so many bytes ever run side by side? Raises PrefixFaultError."""
        if num_rows > self._engine.scheduler.max_rows:
            raise PrefixFaultError(
                f"{num_rows} rows must run together, the batch has {self._engine.scheduler.max_rows}"
            )
        available = self._engine.prefix_allocator.num_blocks * self._block_bytes
        if num_bytes > available:
            raise PrefixFaultError(f"{num_bytes} bytes of prefix memory are needed together, the pool has {available}")

    async def preload(self, refs: tuple[PrefixRef, ...], tenant_id: str | None = None) -> None:
        """Make prefixes resident, all or none, charged to the tenant, else to the owner of the first. Raises as
        `ResidentPrefixes.preload`, or OverloadedError when held prefixes leave no room."""
        asked_by = next((ref.tenant_id for ref in refs), "") if tenant_id is None else tenant_id
        if not await self._call(lambda: self._engine.residents.preload(refs, asked_by=asked_by)):
            raise OverloadedError("no room for the prefix: all resident ones are in use or pinned")
        while await self._call(lambda: any([self._is_loading(ref.key) for ref in refs])):
            await asyncio.sleep(0.01)

    async def pin(self, ref: PrefixRef) -> None:
        """Make a prefix resident and keep it so."""
        try:
            await self._call(lambda: self._engine.residents.pin(ref.key))  # first, so that no step evicts it in between
            await self.preload((ref,))
        except BaseException:
            self._calls.put(lambda: self._engine.residents.unpin(ref.key))
            raise

    async def unpin(self, ref: PrefixRef) -> None:
        await self._call(lambda: self._engine.residents.unpin(ref.key))

    async def evict(self, key: str) -> bool:
        """Drop a resident prefix, by its ref's key. False: a row holds it, or it is not resident."""
        return await self._call(lambda: self._engine.residents.evict(key))

    def residency(self, key: str) -> str:
        """`resident`, `loading` or `cold`."""
        resident = self._engine.residents.get(key)
        if resident is None:
            return "cold"
        return "resident" if resident.state == "ready" else "loading"

    def resident_bytes(self, key: str) -> int:
        resident = self._engine.residents.get(key)
        return 0 if resident is None else len(resident.block_table) * self._block_bytes

    def resident_sizes(self) -> dict[str, int]:
        """Bytes on the device, by key, of all prefixes that are resident or on their way."""
        num_bytes = self._block_bytes
        return {key: num_blocks * num_bytes for key, num_blocks in self._engine.residents.sizes.items()}

    def bytes_on_device(self, layout: Layout) -> int:
        return prefix_blocks(layout, self.shape) * self._block_bytes

    def stats(self) -> EngineStats:
        return stats_of(self._engine, self.num_waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that were admitted and do not run."""
        return max(0, len(self._streams) - len(self._engine.scheduler.running))

    @property
    def _block_bytes(self) -> int:
        return block_bytes(self.shape)

    def forget_failures(self, tenant_id: str) -> None:
        """Load prefixes of this tenant when they are next asked for, although their loads failed lately."""
        self._engine.residents.failures.forget(tenant_id)

    def _is_loading(self, key: str) -> bool:
        failure = self._engine.residents.failures.get(key)
        if failure is not None:
            raise failure
        return self.residency(key) == "loading"

    def _abort(self, request_id: str) -> None:
        self._forget(request_id)
        self._metrics.aborted()
        self._calls.put(lambda: self._engine.abort(request_id))

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._places.leave(request_id)
        self._request_metrics.forget(request_id)
        if not self._streams:
            self._idle.set()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked no longer waits
            try:
                future.set_result(function())
            except Exception as error:  # it is raised where the caller waits
                future.set_exception(error)

        self._calls.put(run)
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        """The thread: take calls, step, hand the outputs over once a step."""
        assert self._loop is not None
        threads = StepThreads()
        while True:
            self._beat_s = time.monotonic()
            try:
                # A waiting row may wait for a load: then the loop goes round at a gentle pace.
                if not self._engine.is_computing:
                    timeout_s = 0.002 if self._engine.has_work else 0.5
                    call = self._calls.get(timeout=timeout_s)
                else:
                    call = self._calls.get_nowait()
                while call is not None:
                    self._take(call)
                    call = self._calls.get_nowait()
                return
            except queue.Empty:
                pass
            start_s = time.monotonic()
            try:
                outputs = self._engine.step()
            except Exception as error:  # the loop must outlive any fault; all rows it may concern are failed
                log.exception("step_failed")
                outputs = self._engine.fail_all(GenerationError(f"the step failed: {error}"))
            threads.after_step(time.monotonic() - start_s)
            if outputs:
                self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _take(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # of what nobody waits for, as an abort
            log.exception("call_failed")

    def _deliver(self, outputs: list[StepOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            request_id = output.sequence.request_id
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # aborted meanwhile
            stream.put(output)
            self._places.leave(request_id)
            self._request_metrics.observe(output, now)
            if output.is_last:
                self._forget(request_id)
