"""8-bit products: near the plain ones, the same to the bit for few rows and for many, refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine import quantized_weights
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.quantized_weights import (
    FEW_ROWS,
    OneDnnWeight,
    PanelWeight,
    QuantizedWeight,
    fastest_kind,
    quantize_weights,
)
from tests.tiny_models import FAMILIES

KINDS = [OneDnnWeight, PanelWeight]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, kernels: CpuKernels) -> type[QuantizedWeight]:
    found: type[QuantizedWeight] = request.param
    if found is OneDnnWeight and fastest_kind(kernels) is not OneDnnWeight:
        pytest.skip("oneDNN's 8-bit products saturate on this processor")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(576, 960), (1536, 576), (64, 96), (37, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_are_bitwise_the_same_beside_any_others(
    kernels: CpuKernels, kind: type[QuantizedWeight], num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype) if has_bias else None
    made = kind(weight, bias, kernels)
    assert made.is_right(weight)
    x = torch.randn(70, num_in, generator=generator).to(dtype)
    every = made(x)
    for n in (1, 2, 3, FEW_ROWS, FEW_ROWS + 1, 6, 7, 33):
        assert torch.equal(made(x[None, :n])[0], every[:n])
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert float((every.float() - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_the_largest_products_do_not_saturate(kernels: CpuKernels, num_rows: int, dtype: torch.dtype) -> None:
    weight = torch.ones(48, 576, dtype=dtype)
    weight[1::2] = -1
    for sign in (1, -1):
        x = torch.full((num_rows, 576), sign, dtype=dtype)
        torch.testing.assert_close(fastest_kind(kernels)(weight, None, kernels)(x), x @ weight.T)


@pytest.mark.parametrize("has_bias", [True, False])
def test_both_kinds_give_the_same(kernels: CpuKernels, has_bias: bool) -> None:
    """Few rows are exact of both on any processor."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 41, generator=generator), torch.randn(FEW_ROWS, 41, generator=generator)
    bias = torch.randn(70, generator=generator) if has_bias else None
    found, expected = (kind(weight, bias, kernels)(x) for kind in KINDS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_row_that_is_not_finite_stays_alone(kernels: CpuKernels, kind: type[QuantizedWeight]) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    made = kind(weight, None, kernels)
    for num_rows in (3, 12):
        x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(1))
        expected = made(x)
        for value in (float("nan"), float("inf")):
            broken = x.clone()
            broken[1, 5] = value
            found = made(broken)
            assert bool(found[1].isnan().all())
            assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert bool((made(torch.zeros(2, 64)) == 0).all())
    assert made(torch.zeros(1, 0, 64)).shape == (1, 0, 96)


def tiny(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"]()).to(dtype).eval().requires_grad_(False)


def test_a_model_in_8_bits_chooses_what_it_chose(kernels: CpuKernels) -> None:
    model, plain = tiny(torch.float32), tiny(torch.float32)
    num_linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert quantize_weights(model, kernels) == num_linears
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        found, expected = (m(input_ids=ids, use_cache=False).logits[0] for m in (model, plain))
    assert float((found - expected).abs().mean()) < 0.1 * float(expected.abs().mean())
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.8


def test_what_cannot_be_quantised_is_refused_by_name(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelRefusedError, match="no kernels"):
        quantize_weights(tiny(torch.float32), None)
    with pytest.raises(ModelRefusedError, match="float16"):
        quantize_weights(tiny(torch.float16), kernels)
    kind = fastest_kind(kernels)
    product = kind.product
    monkeypatch.setattr(kind, "product", lambda self, *values: product(self, *values) * 1.05)
    monkeypatch.setattr(quantized_weights, "fastest_kind", lambda _: kind)
    with pytest.raises(ModelRefusedError, match="not right on this processor"):
        quantize_weights(tiny(torch.float32), kernels)
