"""Reordered and fused products: right, the same for a row whatever runs beside it, and given up where they are not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.engine.linear import FastLinear, FusedLinear
from server.engine.reordered_weights import TOLERANCE, ReorderedWeight, can_reorder, reorder_weights
from tests.tiny_models import FAMILIES

SHAPES = [(576, 960), (1536, 576), (576, 192), (32, 96), (576, 4000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_rows_are_bitwise_the_same_beside_any_others(num_in: int, num_out: int, dtype: torch.dtype) -> None:
    if not can_reorder(dtype):
        pytest.skip(f"this processor reorders no {dtype}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    made = ReorderedWeight(weight, bias)
    assert made.is_right(weight)
    x = torch.randn(200, num_in, generator=generator).to(dtype)
    every = made(x)
    for n in (1, 2, 4, 7, 31, 63, 129):
        assert torch.equal(made(x[None, :n])[0], every[:n])
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert float((every.float() - expected).abs().max()) < (1e-3 if dtype == torch.float32 else 1.5)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_answers_as_before(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    assert reorder_weights(model) > 0
    assert not [m for m in model.modules() if type(m) in (torch.nn.Linear, Conv1D)]
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_model_keeps_its_modules_where_the_processor_reorders_no_such_weights(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    before = logits(model)
    assert (reorder_weights(model) > 0) == can_reorder(dtype)
    if not can_reorder(dtype):
        assert not [m for m in model.modules() if isinstance(m, FastLinear | FusedLinear)]
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_without_16_bit_products_is_not_asked_for_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
    assert not can_reorder(dtype)
    assert reorder_weights(tiny("llama", dtype)) == 0


def test_products_of_one_input_are_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    reorder_weights(model)
    num_fused = sum(isinstance(m, FusedLinear) for m in model.modules())
    num_single = sum(isinstance(m, FastLinear) for m in model.modules())
    assert (num_fused, num_single) == (2 * 5, 2 * 2 + 1)  # q, k, v, gate, up; o, down; the head
    calls = []
    product = ReorderedWeight._product
    monkeypatch.setattr(ReorderedWeight, "_product", lambda self, x: calls.append(1) or product(self, x))
    logits(model)
    assert len(calls) == 2 * (1 + 1 + 1 + 1) + 1


def test_two_threads_do_not_share_an_input() -> None:
    """A trial forward runs beside the steps."""
    model = tiny("llama")
    reorder_weights(model)
    expected = logits(model)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: logits(model), range(40)):
            assert torch.equal(found, expected)


def test_products_that_are_not_right_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    product = ReorderedWeight._product
    for wrong in (lambda self, x: product(self, x) * 1.1, lambda self, x: product(self, x) + len(x) * 1e-7):
        model = tiny("llama")
        before = logits(model)
        with monkeypatch.context() as patch:
            patch.setattr(ReorderedWeight, "_product", wrong)
            assert reorder_weights(model) == 0
        assert torch.equal(logits(model), before)


def test_other_devices_and_dtypes_keep_their_modules() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    assert reorder_weights(model) == 0
    assert reorder_weights(tiny("llama").double()) == 0
    assert torch.float64 not in TOLERANCE
