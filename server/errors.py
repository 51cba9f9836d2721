"""Errors of start-up and settings. The engine's are in `server.engine.errors`, the store's in `prefix_store.errors`."""

from __future__ import annotations


class StartError(Exception):
    """The server cannot start; the text says what was expected and what was found."""


class ModelFilesError(StartError):
    """The model's files are missing, wrong or cannot be fetched."""
