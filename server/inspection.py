"""An upload's checks on files at hand: what an artefact is, and whether it would be taken. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefix_store.admission import check_name, match_base, unverified_reason
from prefix_store.errors import BaseMismatchError, InvalidArtefactError
from prefix_store.local_files import read_path
from prefix_store.prefix import PARTS, Layout, ModelShape, Prefix
from prefix_store.task import UNVERIFIED
from server.config import Settings
from server.engine.errors import ModelRefusedError, one_line
from server.engine.kv_blocks import block_bytes, prefix_blocks
from server.engine.model_config import read_config
from server.engine.model_measures import measure_shape
from server.engine.model_runner import model_class, native_dtype
from server.model_files import find_model, fingerprint
from server.start import DEFAULT_PREFIX_BYTES

SMALL_BYTES = 2**25  # below which an allocator gives memory that was used before


@dataclass(frozen=True)
class Inspection:
    """`reason` says why it does not fit; what could not be read is None. `base` is as in an upload's manifest; so are
    `parts`, the virtual tokens of each part of an encoder-decoder's prefix, and `next_step`, what keeps it from going
    live."""

    path: str
    model: str
    fits: bool
    reason: str | None = None
    next_step: str | None = None
    base: str | None = None
    base_model: str | None = None
    kind: str | None = None
    placement: str | None = None
    separator: int | None = None
    parts: dict[str, int] | None = None
    num_virtual_tokens: int | None = None
    num_bytes: int | None = None
    device_bytes: int | None = None


def model_shape(settings: Settings) -> ModelShape:
    """The measures of the model that `settings` would serve, from its config alone.

    Raises ModelFilesError, ModelRefusedError.
    """
    files = find_model(settings.model, settings.model_revision)
    config = read_config(files.path)
    try:
        return measure_shape(
            _hollow_model(config, native_dtype(settings.dtype, torch.device("cpu"))),
            settings.model_name or files.name,
            fingerprint(files.path),
            settings.model_alias,
            settings.max_virtual_tokens,
        )
    except ModelRefusedError as error:
        raise ModelRefusedError(f"{config.model_type} cannot be served: {error}") from error
    except Exception as error:  # a family's own code raises what it likes
        raise ModelRefusedError(f"{config.model_type} cannot be measured: {one_line(error)}") from error


def _hollow_model(config: Any, dtype: torch.dtype) -> Any:
    """A model that answers questions about its measures. Its weights are memory that nobody has written, so it takes
    none of the machine's, whatever its size."""
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel() * tensor.element_size() < SMALL_BYTES:  # which may be memory that was used before
            tensor.data.zero_()
    return model


def inspect(
    path: Path,
    settings: Settings,
    index: int | None = None,
    *,
    accept_base: bool = False,
    base_fingerprint: str | None = None,
    task: str | None = None,
) -> Inspection:
    """What the server of `settings` would say to the upload of `path` (as `task`), its trial forward apart."""
    shape = model_shape(settings)
    prefix: Prefix | None = None
    base = reason = None
    try:
        prefix = read_path(path, shape, index)
        if task is not None:
            check_name(task, shape)
        base = match_base(prefix, shape, accept_base, base_fingerprint)
    except BaseMismatchError as error:
        base, reason = "mismatch", str(error)
    except InvalidArtefactError as error:
        reason = str(error)
    if prefix is None:
        return Inspection(str(path), shape.model_name, fits=False, reason=reason)
    device_bytes = prefix_blocks(prefix.layout, shape) * block_bytes(shape)
    pool_bytes = int(settings.prefix_bytes or DEFAULT_PREFIX_BYTES)
    if reason is None and device_bytes > pool_bytes:
        reason = f"it needs {device_bytes} bytes of prefix memory, the pool has {pool_bytes}"
    return Inspection(
        path=str(path),
        model=shape.model_name,
        fits=reason is None,
        reason=reason,
        next_step=unverified_reason(prefix.base_model) if base == UNVERIFIED and not accept_base else None,
        base=base,
        base_model=prefix.base_model,
        kind=prefix.kind,
        placement=prefix.placement,
        separator=prefix.separator,
        parts=parts(prefix.layout, shape),
        num_virtual_tokens=prefix.num_virtual_tokens,
        num_bytes=prefix.num_bytes,
        device_bytes=device_bytes,
    )


def parts(layout: Layout, shape: ModelShape) -> dict[str, int] | None:
    """Virtual tokens of each part; None for a decoder-only model, which has one."""
    if not shape.is_encoder_decoder:
        return None
    return {part: getattr(layout, f"num_{part}_tokens") for part in PARTS}
