"""What a step does between two matrix products on a CPU, and products of 8 bits: `cpu_kernels.c`, compiled once by the
machine's C compiler.

Without a compiler, on another device or in another dtype than bf16 and fp32 the same is done by torch's operators.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from pathlib import Path

import structlog
import torch

from prefix_store.private_files import make_folder, why_others_may_change, write
from server.engine.threads import load_openmp

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-fPIC")
COMPILE_S = 120.0
DIGEST_BYTES = 32
LANES, MAX_HEAD_DIM = 16, 512
PANEL = 16  # outputs whose weights lie together for `multiply_int8`
DTYPES = (torch.float32, torch.bfloat16)
NO_WINDOW = 2**62
log = structlog.get_logger()


class Decode(ctypes.Structure):
    """`Decode` of `cpu_kernels.c`, which says what its fields are."""

    _fields_ = (
        ("layer", c_void_p),
        ("query", c_void_p),
        ("out", c_void_p),
        ("query_index", c_void_p),
        ("block_tables", c_void_p),
        ("row_blocks", c_void_p),
        ("key_positions", c_void_p),
        ("positions", c_void_p),
        ("seen_out", c_void_p),
        ("seen_lse", c_void_p),
        ("rows", c_long),
        ("heads", c_long),
        ("kv_heads", c_long),
        ("head_dim", c_long),
        ("num_blocks", c_long),
        ("max_blocks", c_long),
        ("token_stride", c_long),
        ("head_stride", c_long),
        ("window", c_long),
        ("scaling", c_float),
    )


class CpuKernels:
    """The compiled functions. Their tensors are on the CPU, in fp32 or bf16; the last dimension is contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rms_norm = _function(library.rms_norm, *[c_void_p] * 3, c_long, c_long, c_float, c_int, c_int)
        self._silu_mul = _function(library.silu_mul, *[c_void_p] * 2, c_long, c_long, c_int)
        self._rotate = _function(library.rotate, *[c_void_p] * 3, *[c_long] * 5, c_int)
        self._write_kv = _function(library.write_kv, *[c_void_p] * 4, *[c_long] * 9)
        self._attend_decode = _function(library.attend_decode, POINTER(Decode), c_int)
        self._quantize = _function(library.quantize, *[c_void_p] * 3, c_long, c_long, c_int)
        self._scale_rows = _function(library.scale_rows, *[c_void_p] * 3, c_long, c_long, c_int)
        self._few_rows = _function(library.few_rows, *[c_void_p] * 5, c_long, c_long, c_long, c_int)
        self._quantize_wide = _function(library.quantize_wide, *[c_void_p] * 3, c_long, c_long, c_int)
        self._multiply_int8 = _function(library.multiply_int8, *[c_void_p] * 6, *[c_long] * 3, c_int)
        self._argmax = _function(library.argmax, *[c_void_p] * 2, c_long, c_long, c_int)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, plus_one: bool) -> torch.Tensor:
        """`weight * x / rms(x)` over the last dimension; `1 + weight` with `plus_one`, as Gemma has it."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, epsilon, plus_one, _is_bf16(x)
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[..., 2 * dim]` to `[..., dim]`: silu of the first half times the second."""
        dim = gate_up.shape[-1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], dim))
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), out.numel() // dim, dim, _is_bf16(gate_up))
        return out

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """`x` `[1, heads, tokens, dim]`, turned in place by `cosine` and `sine` `[1, tokens, dim]`."""
        _, heads, tokens, dim = x.shape
        _, head_stride, token_stride, _ = x.stride()
        self._rotate(
            x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), tokens, heads, dim, token_stride, head_stride, _is_bf16(x)
        )
        return x

    def write_kv(self, layer: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """`key` and `value` `[kv_heads, tokens, head_dim]` into the `slots` `[tokens]` of a layer of `KVBlocks`."""
        heads, tokens, dim = key.shape
        key_strides, value_strides = key.stride(), value.stride()
        self._write_kv(
            layer.data_ptr(),
            slots.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            tokens,
            heads,
            dim,
            layer.shape[1],
            key_strides[1],
            key_strides[0],
            value_strides[1],
            value_strides[0],
            key.itemsize,
        )

    def attend_decode(
        self,
        decode: Decode,
        query: torch.Tensor,
        out: torch.Tensor,
        layer: torch.Tensor,
        seen: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """One query a row: `query` `[1, heads, tokens, head_dim]` over `layer` of `KVBlocks`, to `out`
        `[tokens, heads, head_dim]`. `seen` is what was attended already: as `out`, and the log-sum-exp, in fp32."""
        _, decode.heads, _, decode.head_dim = query.shape
        _, decode.num_blocks, decode.kv_heads, _ = layer.shape
        _, decode.head_stride, decode.token_stride, _ = query.stride()
        decode.query, decode.out, decode.layer = query.data_ptr(), out.data_ptr(), layer.data_ptr()
        decode.seen_out, decode.seen_lse = (None, None) if seen is None else (seen[0].data_ptr(), seen[1].data_ptr())
        self._attend_decode(decode, _is_bf16(query))

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, dim]` as bytes around 128 and a scale a row `[rows]`, NaN for a row that is not finite."""
        out = torch.empty(x.shape, dtype=torch.uint8)
        scales = torch.empty(x.shape[0], dtype=torch.float32)
        self._quantize(x.data_ptr(), out.data_ptr(), scales.data_ptr(), *x.shape, _is_bf16(x))
        return out, scales

    def quantize_wide(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `quantize`, but around 0 in 16 bits, `[rows, dim]` with a column of 0 behind an odd dim."""
        num_rows, dim = x.shape
        out = torch.empty((num_rows, dim + dim % 2), dtype=torch.int16)
        scales = torch.empty(num_rows, dtype=torch.float32)
        self._quantize_wide(x.data_ptr(), out.data_ptr(), scales.data_ptr(), num_rows, dim, _is_bf16(x))
        return out, scales

    def scale_rows(self, x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` `[rows, dim]` times a scale a row `[rows]`, plus `bias` `[dim]`, in place."""
        at = None if bias is None else bias.data_ptr()
        self._scale_rows(x.data_ptr(), scales.data_ptr(), at, *x.shape, _is_bf16(x))
        return x

    def few_rows(
        self, x: torch.Tensor, weight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Bytes around 128 `x` `[rows, in]` times signed bytes `weight` `[out, in]` times `scales` `[out]`; `zeros` are
        128 times the weight's sums over its inputs."""
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype)
        self._few_rows(
            *(x.data_ptr(), weight.data_ptr(), zeros.data_ptr(), scales.data_ptr(), out.data_ptr()),
            *(x.shape[0], *weight.shape, dtype is torch.bfloat16),
        )
        return out

    def multiply_int8(
        self,
        x: torch.Tensor,
        row_scales: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor,
        out_features: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`[rows, out_features]`: what `quantize_wide` gives times `in_panels` of a weight, times `scales`, plus `bias`
        (both fp32, of the padded outputs)."""
        out = torch.empty((x.shape[0], out_features), dtype=dtype)
        self._multiply_int8(
            *(x.data_ptr(), weight.data_ptr(), scales.data_ptr(), row_scales.data_ptr(), bias.data_ptr()),
            *(out.data_ptr(), x.shape[0], out_features, x.shape[1] // 2, dtype is torch.bfloat16),
        )
        return out

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """The first best token of each row `[rows, vocab_size]`; -1 where a NaN or +infinity is among them, or
        nothing else than -infinity."""
        logits = logits.contiguous()
        out = torch.empty(logits.shape[0], dtype=torch.long)
        self._argmax(logits.data_ptr(), out.data_ptr(), *logits.shape, _is_bf16(logits))
        found: list[int] = out.tolist()
        return found


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    """Signed bytes `[out, in]` as `multiply_int8` reads them: `[panels, pairs of inputs, PANEL, 2]`, zeros behind."""
    num_out, num_in = weight.shape
    padded = torch.nn.functional.pad(weight, (0, num_in % 2, 0, -num_out % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels can attend in such a pool."""
    return device.type == "cpu" and dtype in DTYPES and head_dim % LANES == 0 and head_dim <= MAX_HEAD_DIM


def _function(found: ctypes._NamedFuncPointer, *types: type) -> ctypes._NamedFuncPointer:
    found.argtypes, found.restype = types, None
    return found


def _is_bf16(x: torch.Tensor) -> bool:
    return x.dtype is torch.bfloat16


def load_kernels(folder: Path) -> CpuKernels | None:
    """Compile into `folder` unless it was, and load. Nothing is loaded from where another user might have put it: then
    it is compiled for this process alone, with a warning. None, with a warning, where that cannot be done."""
    try:
        with _trusted(folder) as place:
            path = place / f"cpu-kernels-{_key()}.so"
            if not _is_whole(path):
                _compile(path)
            load_openmp()  # the threads of torch's own products do the work
            return CpuKernels(ctypes.CDLL(str(path)))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("cpu_kernels_missing", reason=str(error))
        return None


@contextmanager
def _trusted(folder: Path) -> Iterator[Path]:
    """`folder`, or one for this process alone where others may change what is in `folder`. Raises OSError."""
    make_folder(folder)
    reason = why_others_may_change(folder)
    if reason is None:
        yield folder
        return
    log.warning("cpu_kernels_not_kept", reason=reason)
    with tempfile.TemporaryDirectory(prefix="prefixserve-kernels-") as temporary:
        if reason := why_others_may_change(Path(temporary)):
            raise OSError(reason)
        yield Path(temporary)


def _key() -> str:
    """Of the source and the processor that it is compiled for."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model"))}))
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + processor.encode()).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """A library ends with its digest: a loader that maps a cut one may kill the process. The digest is no proof of who
    wrote it: one that others may change, or that cannot be read, is compiled again."""
    try:
        if why_others_may_change(path):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler was found (Debian: apt-get install gcc libc6-dev)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, library = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        steps = ([*FLAGS, "-c", str(SOURCE), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(library)])
        for command in steps:
            done = subprocess.run([compiler, *command], capture_output=True, timeout=COMPILE_S, check=False)
            if done.returncode:
                raise OSError(f"{compiler} failed: {done.stderr.decode(errors='replace').strip()[:500]}")
        content = library.read_bytes()
        if path.is_dir():
            shutil.rmtree(path)
        write(path, content + hashlib.sha256(content).digest())
