"""What the engine refuses or fails with. Status codes are the api's business.

EngineError
 +- ModelRefusedError      the model would answer wrongly under packed attention
 +- PromptTooLongError     prompt, prefixes and new tokens can never be served together, or there is no prompt
 |   +- ContextLengthError     prompt, virtual tokens and new tokens do not fit the context or the KV memory
 +- ChatRefusedError       the model's chat template does not take these messages
 +- UnknownTokenError      the tokenizer gives the prompt a token that the model has no embedding for
 +- TooManyAnswersError    the answers of one request are more than the queue ever holds
 +- OverloadedError        the queue is full; try again after `retry_after_s`
 |   +- QueueTimeoutError  waited longer than the queue allows
 |   +- PinnedRoomError    pinned prefixes leave no room for this one
 +- TenantBusyError        the tenant has all that it may at once; try again after `retry_after_s`
 |   +- TenantPinnedError    device memory: its own pinned prefixes leave no room for this one
 |   +- TenantQueueFullError   queue places
 |   +- TenantQueueTimeoutError  rows: it waited for its own longer than the queue allows
 +- PrefixLoadError        the prefix could not be made resident
 +- PrefixAwayError        its file cannot be reached now; try again after `retry_after_s`
 +- PrefixFaultError       the prefix gives logits that are not finite, is not as expected or does not fit the pool
 +- GenerationError        the row failed at run time

Any of them may be the prefix's own fault (`is_versions_fault`), which counts against the version that was asked for.
"""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """The first line of what an error of others says, and its type."""
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return f"{type(error).__name__}: {text}"


class EngineError(Exception):
    """Base of every error that the engine raises for a caller's request. `is_versions_fault`: the prefix's file is
    damaged, or its numbers; not where memory was short, a step failed or a limit forbids it."""

    def __init__(self, message: str, *, is_versions_fault: bool = False) -> None:
        super().__init__(message)
        self.is_versions_fault = is_versions_fault


class ModelRefusedError(EngineError):
    pass


class PromptTooLongError(EngineError):
    pass


class ContextLengthError(PromptTooLongError):
    """`num_read` tokens of the prompt (`reads_start`: of what an encoder-decoder's answer starts with), `num_virtual`
    before them and `num_new` after them are more than `limit`. `is_least`: the prompt has `num_read` tokens or more."""

    def __init__(
        self,
        message: str,
        *,
        limit: int,
        num_read: int,
        num_virtual: int = 0,
        num_new: int = 0,
        reads_start: bool = False,
        is_least: bool = False,
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.num_read, self.num_virtual, self.num_new = num_read, num_virtual, num_new
        self.reads_start, self.is_least = reads_start, is_least

    @property
    def fits_without_answer(self) -> bool:
        """Whether a shorter answer would fit."""
        return self.num_new > 1 and self.num_virtual + self.num_read < self.limit


class ChatRefusedError(EngineError):
    """`param` is the field that the template does not take."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


class TooManyAnswersError(EngineError):
    pass


class UnknownTokenError(EngineError):
    pass


class OverloadedError(EngineError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(OverloadedError):
    pass


class PinnedRoomError(OverloadedError):
    pass


class TenantBusyError(EngineError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TenantPinnedError(TenantBusyError):
    pass


class TenantQueueFullError(TenantBusyError):
    pass


class TenantQueueTimeoutError(TenantBusyError):
    pass


class PrefixLoadError(EngineError):
    pass


class PrefixAwayError(EngineError):
    retry_after_s = 10


class PrefixFaultError(EngineError):
    pass


class GenerationError(EngineError):
    pass
