"""8-bit products: near the plain ones, the same to the bit for few rows and for many, refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError
from server.engine.quantized_weights import FEW_ROWS, QuantizedWeight, quantize_weights
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(576, 960), (1536, 576), (64, 96), (37, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_are_bitwise_the_same_beside_any_others(
    kernels: CpuKernels, num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype) if has_bias else None
    made = QuantizedWeight(weight, bias, kernels)
    assert made.is_right(weight)
    x = torch.randn(70, num_in, generator=generator).to(dtype)
    every = made(x)
    for n in (1, FEW_ROWS, FEW_ROWS + 1, 33):
        assert torch.equal(made(x[None, :n])[0], every[:n])
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert float((every.float() - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_a_row_that_is_not_finite_stays_alone(kernels: CpuKernels) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    made = QuantizedWeight(weight, None, kernels)
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
    product = QuantizedWeight.product
    monkeypatch.setattr(QuantizedWeight, "product", lambda self, values, dtype: product(self, values, dtype) * 1.05)
    with pytest.raises(ModelRefusedError, match="not right on this processor"):
        quantize_weights(tiny(torch.float32), kernels)
