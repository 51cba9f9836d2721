"""A model that is loaded, measured and right on packed rows, or a refusal in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from prefix_store.prefix import ModelShape
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError, one_line
from server.engine.model_config import read_config, reason_of
from server.engine.model_measures import measure_shape
from server.engine.model_runner import load_model
from server.engine.self_check import self_check

FAMILIES = "docs/models.md lists the families that are served"
log = structlog.get_logger()


@dataclass(frozen=True)
class CheckedModel:
    """`kernels` is None where the model keeps its own modules."""

    model: Any
    shape: ModelShape
    kernels: CpuKernels | None


def checked_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str,
    fingerprint: str,
    aliases: tuple[str, ...] = (),
    max_virtual_tokens: int = 4096,
    kernels: CpuKernels | None = None,
    quantizes: bool = False,
) -> CheckedModel:
    """With reordered weights and `kernels`, or with the model's own modules where only these pass. Whatever loading and
    checking raise, raises ModelRefusedError with the family, the cause and what to do."""

    def attempt(*, is_fast: bool) -> CheckedModel:
        used = kernels if is_fast else None
        model = load_model(path, dtype, device, reorders=is_fast, kernels=used, quantizes=quantizes)
        shape = measure_shape(model, name, fingerprint, aliases, max_virtual_tokens)
        self_check(model, shape, used, is_quantized=quantizes)
        return CheckedModel(model, shape, used)

    family = "the model"
    try:
        family = read_config(path).model_type
        try:
            return attempt(is_fast=True)
        except Exception as error:  # also where a family's modules are not what a kernel's probe expects
            if quantizes:
                raise
            reason = one_line(error)
        # Outside of the except: an error keeps alive the model that it was raised on.
        checked = attempt(is_fast=False)
        log.warning("model_keeps_its_modules", reason=reason)
        return checked
    except ModelRefusedError as error:
        raise ModelRefusedError(f"{family} cannot be served: {error}; {FAMILIES}") from error
    except Exception as error:  # transformers, torch and a family's own code raise what they like
        raise ModelRefusedError(f"{family} in {path} cannot be loaded: {reason_of(error)}; {FAMILIES}") from error
