"""One request's tokens on their way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from server.engine.engine import StepOutput
from server.engine.errors import EngineError
from server.engine.sequence import FinishReason, Sequence, TokenOutput


class RequestStream:
    """One request's tokens as they come. Leaving the `async with` early aborts the row. However it ends, `on_end` is
    called once; `error` is what ended it, if one did."""

    def __init__(self, sequence: Sequence, abort: Callable[[], None]) -> None:
        self._sequence = sequence
        self._abort = abort
        self._outputs: deque[StepOutput] = deque()
        self._has_output = asyncio.Event()
        self._waits_for_last = False
        self._is_over = False
        self._finished_s: float | None = None
        self.on_end: Callable[[], None] | None = None
        self.error: EngineError | None = None

    def put(self, output: StepOutput) -> None:
        self._outputs.append(output)
        if not self._waits_for_last or output.is_last:
            self._has_output.set()

    def fail(self, error: EngineError) -> None:
        self.put(StepOutput(self._sequence, error=error))

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        """The next token. Raises the EngineError that ended the row, if one did."""
        if self._is_over:
            raise StopAsyncIteration
        while not self._outputs:
            self._has_output.clear()
            await self._has_output.wait()
        output = self._outputs.popleft()
        if output.error is not None:
            self.error = output.error
            self._end()
            raise output.error
        assert output.token is not None
        if output.token.finish_reason is not None:
            self._end()
        return output.token

    async def rest(self) -> list[TokenOutput]:
        """All tokens that are still to come, in one go: who waits for the last is not woken for each."""
        self._waits_for_last = True
        while not self._is_over and not (self._outputs and self._outputs[-1].is_last):
            self._has_output.clear()
            await self._has_output.wait()
        return [output async for output in self]

    def abort(self) -> None:
        """Free the row, if it still runs. May be called any number of times."""
        if not self._is_over:
            self._end()
            self._abort()

    def _end(self) -> None:
        self._is_over = True
        self._finished_s = time.monotonic()
        if self.on_end is not None:
            self.on_end()

    @property
    def generated_text(self) -> str:
        return self._sequence.detokenizer.text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._sequence.finish_reason

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._sequence.prompt_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return self._sequence.num_prompt_tokens

    @property
    def num_rows(self) -> int:
        return len(self._sequence.rows)

    @property
    def num_virtual_tokens(self) -> int:
        return self._sequence.num_virtual_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose K and V were reused from earlier text, by every row of an ensemble."""
        return self._sequence.num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        return self._sequence.num_generated_tokens

    @property
    def queue_s(self) -> float:
        started_s = self._sequence.started_s
        return 0.0 if started_s is None else started_s - self._sequence.arrival_s

    @property
    def inference_s(self) -> float:
        started_s = self._sequence.started_s
        end_s = self._finished_s if self._finished_s is not None else time.monotonic()
        return 0.0 if started_s is None else end_s - started_s
