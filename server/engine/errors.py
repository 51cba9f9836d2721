"""What the engine refuses or fails with. Status codes are the api's business.

EngineError
 +- ModelRefusedError      the model would answer wrongly under packed attention
 +- PromptTooLongError     prompt, virtual tokens and new tokens do not fit the context or the pool
 +- OverloadedError        the queue is full; try again after `retry_after_s`
 |   +- QueueTimeoutError  waited longer than the queue allows
 |   +- PinnedRoomError    pinned prefixes leave no room for this one
 +- TenantQueueFullError   the tenant has all the queue places it may; try again after `retry_after_s`
 +- PrefixLoadError        the prefix could not be made resident
 +- PrefixFaultError       the prefix gives logits that are not finite, or does not fit the pool
 +- GenerationError        the row failed at run time
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error that the engine raises for a caller's request."""


class ModelRefusedError(EngineError):
    pass


class PromptTooLongError(EngineError):
    pass


class OverloadedError(EngineError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(OverloadedError):
    pass


class PinnedRoomError(OverloadedError):
    pass


class TenantQueueFullError(EngineError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PrefixLoadError(EngineError):
    pass


class PrefixFaultError(EngineError):
    pass


class GenerationError(EngineError):
    pass
