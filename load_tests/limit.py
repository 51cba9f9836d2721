"""What this machine can do at best, in one run with what our step takes: reading memory, the model's matrix products
alone (plain, reordered, int8), the model's step.

    python load_tests/limit.py [--dtypes bfloat16,float32] [--rounds 15] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from figures import Bound, in_ms, in_turn
from in_process import CPU, InProcess
from results import REORDERED, SAMPLING, Run, options
from workloads import asks_of, measures_of

from server.engine.cpu_kernels import load_kernels
from server.engine.linear import FUSED
from server.engine.model_runner import load_model, native_dtype
from server.engine.quantized_weights import QuantizedWeight, fastest_kind
from server.engine.reordered_weights import ReorderedWeight, can_reorder
from server.model_files import ModelFiles, cache_dir, find_model

ROW_COUNTS = (1, 8, 32, 64, 256)
MAX_STEP_ROWS, CONTEXT = 64, 64
AT_LEAST = {torch.bfloat16: 0.60, torch.float32: 0.70}
BOUND_ROWS = (32, 64)
READ_BYTES = 5 * 2**28
PLAIN, INT8, STEP = "plain products", "int8", "model step"
Products = list[Callable[[Any], object]]  # of the rows, or of what they are in 8 bits


def fused_weights(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    """The weights of a step's products in order; those that take one input as one list."""
    found = []
    for parent in model.modules():
        own = {name: child.weight for name, child in parent.named_children() if type(child) is torch.nn.Linear}
        for names in FUSED:
            if all(name in own for name in names):
                found.append([own.pop(name) for name in names])
        found += [[weight] for weight in own.values()]
    return found


def _multiply(weight: QuantizedWeight, dtype: torch.dtype, rounded: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return weight.product(*rounded, dtype)


def all_of(products: Products, inputs: list[Any]) -> float:
    """Seconds for a step's products, one after another."""
    start_s = time.perf_counter()
    for product, x in zip(products, inputs, strict=True):
        product(x)
    return time.perf_counter() - start_s


def measure_read(run: Run) -> None:
    num_bytes = READ_BYTES // (16 if run.is_quick else 1)
    values = torch.ones(num_bytes // 4)

    def read(_: int) -> float:
        start_s = time.perf_counter()
        values.sum()
        return num_bytes / (time.perf_counter() - start_s) / 1e9

    title = f"memory, the sum of {num_bytes / 1e9:.1f} GB on all threads"
    run.keep("read", title, "GB/s", in_turn({"read": read}, run.rounds))


@torch.inference_mode()
def measure_products(run: Run, files: ModelFiles, dtype: torch.dtype) -> None:
    weights = fused_weights(load_model(files.path, dtype, CPU, reorders=False))
    fused = [torch.cat(group) for group in weights]
    forms: dict[str, tuple[Products, list[int]]] = {
        PLAIN: (
            [partial(torch.nn.functional.linear, weight=weight) for group in weights for weight in group],
            [weight.shape[1] for group in weights for weight in group],
        ),
    }
    if can_reorder(dtype):
        forms[REORDERED] = [ReorderedWeight(weight, None) for weight in fused], [weight.shape[1] for weight in fused]
    kernels = load_kernels(cache_dir() / "kernels")
    if kernels is not None:
        kind = fastest_kind(kernels)
        in_8_bits = [kind(weight, None, kernels) for weight in fused]
        rounders = {weight.in_features: weight.quantized for weight in in_8_bits}
        products = [partial(_multiply, weight, dtype) for weight in in_8_bits]
        forms[INT8] = products, [weight.shape[1] for weight in fused]
    num_bytes = sum(weight.numel() for weight in fused) * dtype.itemsize
    engine = InProcess(
        files, measures_of(files.path), dtype, max_rows=MAX_STEP_ROWS, max_step_tokens=MAX_STEP_ROWS * CONTEXT
    )
    name = str(dtype).removeprefix("torch.")
    for num_rows in (1, 8) if run.is_quick else ROW_COUNTS:
        measures: dict[str, Callable[[], float]] = {}
        for form, (products, widths) in forms.items():
            by_width: dict[int, Any] = {width: torch.randn(num_rows, width).to(dtype) for width in set(widths)}
            if form == INT8:
                by_width = {width: rounders[width](x) for width, x in by_width.items()}
            measures[form] = partial(all_of, products, [by_width[width] for width in widths])
        rows = {}
        if num_rows <= MAX_STEP_ROWS:
            rows = engine.rows(limit=asks_of([None] * num_rows, CONTEXT - 1))
            measures |= {STEP: rows["limit"].model_s, SAMPLING: rows["limit"].sampling_s}
        timed = {form: in_ms(seconds) for form, seconds in measures.items()}
        series = in_turn(timed, run.rounds, num_warm=2)
        engine.drop(rows)
        bounds = ()
        if num_rows in BOUND_ROWS and dtype in AT_LEAST and can_reorder(dtype):
            text = f"reordered products alone against the model's step, {num_rows} rows, {name}"
            bounds = (Bound(text, REORDERED, STEP, at_least=AT_LEAST[dtype]),)
        title = f"{num_rows} row{'s' * (num_rows > 1)}, {name}, weights of {num_bytes / 1e6:.0f} MB, context {CONTEXT}"
        run.keep(f"{name}-{num_rows}", title, "ms", series, bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    native = str(native_dtype("auto", CPU)).removeprefix("torch.")
    parser.add_argument("--dtypes", default=",".join(dict.fromkeys((native, "float32"))), help="with commas")
    arguments = options(parser, rounds=15)
    run, files = Run.of("limit", arguments), find_model(None)
    measure_read(run)
    for name in arguments.dtypes.split(","):
        measure_products(run, files, getattr(torch, name))
        gc.collect()
    run.finish()


if __name__ == "__main__":
    main()
