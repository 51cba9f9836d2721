"""A model's own `config.json`, as transformers reads it. Python code that comes with a model is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from server.engine.errors import ModelRefusedError, one_line


def read_config(path: str | Path, revision: str | None = None) -> Any:
    """The config of the model in folder `path`. Raises ModelRefusedError for one that cannot be read."""
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes
        raise ModelRefusedError(f"its config.json cannot be read: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """One line that says what transformers could not load, and tells nobody to trust the model's code."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with the model, which is never run here"
    return one_line(error)
