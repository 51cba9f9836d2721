"""A torch file that holds weights alone: bounded, and read without running anything that is in it."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from prefix_store.errors import InvalidArtefactError

MAX_FILE_BYTES = 4 * 2**30
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SavedList:
    """Stands in for `torch.nn.ParameterList` while a file is read: it keeps the state and runs no module's code."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


PARAMETER_LIST = (SavedList, "torch.nn.modules.container.ParameterList")
# how torch's restricted unpickler says that a file calls for a class or function it does not allow
FORBIDDEN = re.compile(r"(?:GLOBAL |class |function )([\w.]+\.[\w.]+)")


def check_file_size(path: Path) -> None:
    """Raises InvalidArtefactError."""
    if not path.is_file():
        raise InvalidArtefactError(f"expected a file of weights, found nothing at {path}")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise InvalidArtefactError(f"{path.name} must be <= {MAX_FILE_BYTES} bytes, got {num_bytes}")


def read_weights_file(path: Path) -> object:
    """What `torch.save` wrote: tensors, numbers, texts, and lists and dicts of them. Raises InvalidArtefactError."""
    check_file_size(path)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        with torch.serialization.safe_globals([PARAMETER_LIST]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch does not write: refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not one of weights alone
        named = FORBIDDEN.search(str(error))
        if named is not None:
            raise InvalidArtefactError(
                f"{path.name}: expected weights alone, got a pickle that names {named[1][:100]}: it is not run"
            ) from error
        got = "a pickle of other objects" if isinstance(error, pickle.UnpicklingError) else "what torch cannot read"
        raise InvalidArtefactError(f"{path.name}: expected weights alone, written by torch.save; got {got}") from error


def plain_tensor(name: str, found: object) -> torch.Tensor:
    """The floating tensor itself, no larger than the bytes that were read for it. Raises InvalidArtefactError."""
    name = name if name.isprintable() and len(name) <= 100 else repr(name[:100])  # a name out of the file
    if not isinstance(found, torch.Tensor):
        raise InvalidArtefactError(f"{name}: expected a tensor, got {type(found).__name__}")
    tensor = torch.Tensor.detach(found)
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise InvalidArtefactError(f"{name}: expected a dense tensor, got {tensor.layout} on {tensor.device.type}")
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise InvalidArtefactError(f"{name}: dtype must be one of {expected}, got {tensor.dtype}")
    if 0 in tensor.shape:
        raise InvalidArtefactError(f"{name}: expected dimensions of at least 1, got {list(tensor.shape)}")
    needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > held:
        raise InvalidArtefactError(
            f"{name}: {list(tensor.shape)} takes {needed} bytes, the file holds {held} for it (an expanded tensor)"
        )
    return tensor


def _check_archive(path: Path) -> None:
    """As torch writes it: nothing compressed, no bytes used twice; so no more is read than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InvalidArtefactError(f"{path.name}: expected an archive of torch.save, got a broken one") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InvalidArtefactError(f"{path.name}: expected uncompressed records, {entry.filename!r} is compressed")
    claimed, there = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > there:
        raise InvalidArtefactError(f"{path.name}: its records claim {claimed} bytes, {there} are there")
