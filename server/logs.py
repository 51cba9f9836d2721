"""What the server writes to standard error: its log, and what libraries, warnings and crashes have to say, each entry a
line of JSON or a line for people."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

import structlog

from prefix_store.printable import escaped

log = structlog.get_logger()


def is_for_people() -> bool:
    """Whether standard error is a terminal that moves its cursor: only there lines may be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def quiet_libraries() -> None:
    """No progress bars of libraries, which are yet to be imported, unless people look on."""
    if not is_for_people():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def set_up_logs(log_json: bool) -> None:
    """Before anything is logged."""
    is_coloured = is_for_people() and not os.environ.get("NO_COLOR")
    as_text = [_escape_values, structlog.dev.ConsoleRenderer(colors=is_coloured)]
    renderers: list[Any] = [structlog.processors.JSONRenderer()] if log_json else as_text
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # as it is then: a test may have swapped it
    )
    logging.basicConfig(handlers=[_ToLog()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    if log_json:
        sys.excepthook = _log_crash
        threading.excepthook = lambda given: _log_crash(given.exc_type, given.exc_value, given.exc_traceback)


def _escape_values(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What callers sent does not reach a terminal as it stands; a traceback keeps its lines."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = escaped(value, keep="\n\t" if name == "exception" else "")
    return event


def adopt_loggers() -> None:
    """Libraries that were imported give up handlers of their own: what they say is in the log as well."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


class _ToLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = " ".join(record.getMessage().split())
            log.log(record.levelno, text, logger=record.name, exc_info=record.exc_info)
        except Exception:  # as logging does with its own: what cannot be told does not stop the server
            self.handleError(record)


def _log_crash(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    log.critical("crashed", exc_info=(kind, error, trace))
