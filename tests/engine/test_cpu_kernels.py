"""Every kernel against torch's operators; a row's bits whatever runs beside it; what is not finite stays in its row;
and a start where the kernels cannot be compiled, or where what was compiled is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prefix_store.prefix import ModelShape
from server.engine import cpu_kernels
from server.engine.attention_group import AttentionGroup, Hidden
from server.engine.cpu_kernels import PANEL, CpuKernels, in_panels, load_kernels
from server.engine.kv_blocks import BLOCK_SIZE, KVBlocks, num_blocks_for
from server.engine.reach import Reach
from server.engine.sequence import Context

DTYPES = [torch.float32, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
LENGTHS = [1, 2, 15, 16, 17, 100, 127, 128, 129, 143, 144, 145, 255, 256, 257, 300]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """What sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_near(found: torch.Tensor, expected: torch.Tensor, num_roundings: int = 1) -> None:
    """`expected` in fp64. bf16: as near as that many roundings of it."""
    relative = 2e-6 if found.dtype is torch.float32 else num_roundings * 2.0**-8
    scale = expected.abs().amax(-1, keepdim=True)
    far = (found.double() - expected).abs() - relative * expected.abs() - 2e-6 * scale
    assert found.shape == expected.shape
    assert float(far.max()) <= 0, float(far.max())


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# What a row's own numbers become: `[rows, dim]` to `[rows, ...]`.
ROWWISE: dict[str, Callable[[CpuKernels, torch.Tensor], torch.Tensor]] = {
    "rms_norm": lambda kernels, x: kernels.rms_norm(x, randn(x.shape[-1], dtype=x.dtype), 1e-6, plus_one=False),
    "gemma_norm": lambda kernels, x: kernels.rms_norm(x, randn(x.shape[-1], dtype=x.dtype), 1e-6, plus_one=True),
    "silu_mul": lambda kernels, x: kernels.silu_mul(x[:, : x.shape[-1] // 2 * 2].contiguous()),
    "rotate": lambda kernels, x: rotated(kernels, x),
    "quantize": lambda kernels, x: unquantized(*kernels.quantize(x)),
    "quantize_wide": lambda kernels, x: kernels.quantize_wide(x)[0] * kernels.quantize_wide(x)[1][:, None],
    "scale_rows": lambda kernels, x: kernels.scale_rows(
        x.clone(), x[:, 0].float().contiguous(), randn(x.shape[-1], dtype=x.dtype)
    ),
    "argmax": lambda kernels, x: torch.tensor(kernels.argmax(x))[:, None],
}


def first(x: torch.Tensor) -> torch.Tensor:
    """Of each row, as a scale."""
    return x[:, 0].float().contiguous()


def unquantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (values.float() - 128) * scales[:, None]


def rotated(kernels: CpuKernels, x: torch.Tensor) -> torch.Tensor:
    """Every row a token with one head, all at one position."""
    dim = x.shape[-1] // 2 * 2
    angles = randn(1, 1, dim).expand(1, len(x), dim)
    cosine, sine = (turn(angles).to(x.dtype).contiguous() for turn in (torch.cos, torch.sin))
    return kernels.rotate(x[None, None, :, :dim].clone(), cosine, sine)[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 577, 2048])
def test_rms_norm(kernels: CpuKernels, dim: int, plus_one: bool, dtype: torch.dtype) -> None:
    x, weight = randn(3, 5, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
    for scaled in (x, x * 1e-3, x * 1e4, x.transpose(0, 1), x[:, 1:4]):
        wide = scaled.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        found = kernels.rms_norm(scaled, weight, 1e-6, plus_one=plus_one)
        assert found.dtype is dtype
        check_near(found, normed * (plus_one + weight.double()), num_roundings=1 if plus_one else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 200, 1536])
def test_silu_mul(kernels: CpuKernels, dim: int, dtype: torch.dtype) -> None:
    gate_up = randn(2, 7, 2 * dim, dtype=dtype) * 4
    gate, up = gate_up.double().split(dim, -1)
    check_near(kernels.silu_mul(gate_up), torch.nn.functional.silu(gate) * up, num_roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_what_is_large_is_finite_and_right(kernels: CpuKernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 20, -20, 87, -87, 88, -88, 89, -89, 1e4, -1e4, 1e30, -1e30], dtype=dtype)
    found = kernels.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])
    torch.testing.assert_close(found[0].double(), torch.nn.functional.silu(gate.double()), rtol=2.0**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 16), (9, 4, 64), (40, 9, 128), (3, 2, 26)])
def test_rotate_turns_views_in_place(
    kernels: CpuKernels, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Of a product that holds queries, keys and values side by side, and of heads of which only a part is turned."""
    product = randn(1, tokens, heads + 2, dim + 6, dtype=dtype)
    before = product.clone()
    x = product[:, :, 1 : heads + 1, :dim].transpose(1, 2)
    angles = randn(1, tokens, dim, seed=1)
    cosine, sine = angles.cos().to(dtype), (angles * 1.3).sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(x.double(), x.double(), cosine.double(), sine.double())
    found = kernels.rotate(x, cosine, sine)
    assert found.data_ptr() == x.data_ptr()
    check_near(found, expected)
    turned = torch.zeros_like(product, dtype=torch.bool)
    turned[:, :, 1 : heads + 1, :dim] = True
    assert same_bits(product[~turned], before[~turned])


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_first_of_the_best(kernels: CpuKernels, dtype: torch.dtype) -> None:
    for num_rows, vocab_size in ((1, 1), (3, 17), (40, 1000), (5, 49152)):
        logits = randn(num_rows, vocab_size, dtype=dtype)
        logits[:, 0] = -INF if vocab_size > 1 else 0
        assert kernels.argmax(logits) == logits.float().argmax(-1).tolist()
        assert kernels.argmax(logits.T.contiguous().T) == logits.float().argmax(-1).tolist()
    ties = torch.full((4, 300), -7.0, dtype=dtype)
    for row, (first, second) in enumerate([(0, 299), (15, 16), (31, 200), (298, 299)]):
        ties[row, [first, second]] = -0.5
    assert kernels.argmax(ties) == [0, 15, 31, 298]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -NAN])
@pytest.mark.parametrize("place", [0, 5, 16, 36])
def test_argmax_finds_no_token_in_a_row_that_is_not_finite(
    kernels: CpuKernels, place: int, value: float, dtype: torch.dtype
) -> None:
    logits = randn(4, 37, dtype=dtype)
    expected = logits.float().argmax(-1).tolist()
    logits[2, place] = value
    assert kernels.argmax(logits) == [*expected[:2], -1, expected[3]]
    assert kernels.argmax(torch.full((1, 37), -INF, dtype=dtype)) == [-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 31, 577])
@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e30])
def test_quantised_rows_are_within_half_a_step(kernels: CpuKernels, scale: float, dim: int, dtype: torch.dtype) -> None:
    x = (randn(9, dim) * scale).to(dtype)
    x[4] = 0
    values, scales = kernels.quantize(x)
    steps = x.double().abs().amax(-1, keepdim=True) / 127
    assert values.dtype is torch.uint8
    assert (values[4] == 128).all()
    torch.testing.assert_close(scales.double()[:, None], steps, rtol=1e-5, atol=1e-44)
    near = 0.5001 if scale > 1e-30 else 0.51  # a scale of 1e-40 has few bits
    assert ((unquantized(values, scales).double() - x.double()).abs() <= near * steps).all()
    assert (values.amax(-1) == 255).logical_or(values.amin(-1) == 1)[[0, 1, 2, 3, 5, 6, 7, 8]].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 31, 577])
def test_wide_rows_are_the_same_numbers_in_16_bits(kernels: CpuKernels, dim: int, dtype: torch.dtype) -> None:
    x = randn(9, dim, dtype=dtype)
    x[4] = NAN
    (values, scales), (wide, wide_scales) = kernels.quantize(x), kernels.quantize_wide(x)
    assert torch.equal(wide[:, :dim], values.short() - 128)
    assert (wide[:, dim:] == 0).all()
    assert wide.shape[1] == dim + dim % 2
    assert same_bits(wide_scales, scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (2, 16), (41, 70), (576, 48), (1536, 17)])
def test_products_of_bytes_are_exact(
    kernels: CpuKernels, num_in: int, num_out: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    weight[0] = 127  # the largest sums
    x = torch.randint(-127, 128, (20, num_in), generator=generator, dtype=torch.int16)
    x[:2] = torch.tensor([[127], [-127]])
    row_scales, scales, bias = randn(20), randn(num_out, seed=1), randn(num_out, seed=2)
    padding = (0, -num_out % PANEL)
    of_weight = in_panels(weight), *(torch.nn.functional.pad(each, padding) for each in (scales, bias))
    padded = torch.nn.functional.pad(x, (0, num_in % 2))
    every = kernels.multiply_int8(padded, row_scales, *of_weight, num_out, dtype)
    products = x.double() @ weight.double().T * scales.double() * row_scales.double()[:, None]
    check_near(every, products + bias.double())
    for num_threads in (1, 2, 3):
        threads(num_threads)
        for count in range(1, 21):
            found = kernels.multiply_int8(padded[:count], row_scales[:count], *of_weight, num_out, dtype)
            assert same_bits(found, every[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 17, 200])
def test_scale_rows_works_in_place(kernels: CpuKernels, dim: int, dtype: torch.dtype) -> None:
    x, scales, bias = randn(6, dim, dtype=dtype), randn(6, seed=1), randn(dim, dtype=dtype, seed=2)
    for added in (None, bias):
        expected = x.double() * scales.double()[:, None] + (0 if added is None else added.double())
        taken = x.clone()
        found = kernels.scale_rows(taken, scales, added)
        assert found.data_ptr() == taken.data_ptr()
        check_near(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 577, 49153])
@pytest.mark.parametrize("name", list(ROWWISE))
def test_rows_are_bitwise_the_same_beside_any_others_and_on_any_threads(
    kernels: CpuKernels, name: str, dim: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """A row stands elsewhere in memory when it is alone."""
    x = randn(64, dim, dtype=dtype)
    every = ROWWISE[name](kernels, x)
    for row in (0, 1, 2, 31, 63):
        assert same_bits(ROWWISE[name](kernels, x[row : row + 1].clone()), every[row : row + 1])
    for num_threads in (2, 3, 4):
        threads(num_threads)
        assert same_bits(ROWWISE[name](kernels, x), every)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ROWWISE if name != "argmax"])
def test_what_is_not_finite_stays_in_its_row(kernels: CpuKernels, name: str, dtype: torch.dtype) -> None:
    x = randn(5, 66, dtype=dtype)
    expected = ROWWISE[name](kernels, x)
    for value in (NAN, INF):
        bad = x.clone()
        bad[2, 40] = value
        found = ROWWISE[name](kernels, bad)
        assert not found[2].isfinite().all()
        assert same_bits(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("name", [name for name in ROWWISE if name != "argmax"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0x7FFF, 0xFFC0 - 0x10000, 0xFF81 - 0x10000, -1])
def test_a_nan_survives_rounding_to_bf16(kernels: CpuKernels, name: str, bits: int) -> None:
    """Whatever it carries: rounded as a number, some become infinity or 0."""
    x = randn(3, 64, dtype=torch.bfloat16)
    x.view(torch.int16)[1] = bits
    assert ROWWISE[name](kernels, x)[1].isnan().all()


@dataclass(frozen=True)
class Scene:
    """Rows of one query each over a pool whose every slot holds something. `query` `[1, heads, tokens, head_dim]` has
    tokens of other rows too, and is a view."""

    kv_blocks: KVBlocks
    group: AttentionGroup
    query: torch.Tensor

    @property
    def tokens(self) -> list[int]:
        return self.group.query_index.tolist()

    def attended(
        self,
        *,
        layer: int = 0,
        window: int | None = None,
        scaling: float | None = None,
        seen: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Of the kernel `[rows, heads, head_dim]`."""
        assert self.kv_blocks.kernels is not None
        _, heads, num_tokens, head_dim = self.query.shape
        out = torch.full((num_tokens, heads, head_dim), 77.0, dtype=self.query.dtype)
        decode = self.group.decode(layer, window, head_dim**-0.5 if scaling is None else scaling)
        self.kv_blocks.kernels.attend_decode(decode, self.query, out, self.kv_blocks.layers[layer], seen)
        others = [token for token in range(num_tokens) if token not in self.tokens]
        assert (out[others] == 77).all(), "it wrote to tokens of other rows"
        return out[self.tokens]

    def expected(
        self,
        *,
        layer: int = 0,
        window: int | None = None,
        scaling: float | None = None,
        seen: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """By torch's operators in fp64, row by row."""
        _, heads, _, head_dim = self.query.shape
        pool = (
            self.kv_blocks.layers[layer]
            .double()
            .view(2, -1, self.kv_blocks.layers[layer].shape[2], BLOCK_SIZE, head_dim)
        )
        found = []
        for row, token in enumerate(self.tokens):
            blocks = self.group.block_tables[row, : int(self.group.row_blocks[row])]
            keys, values = pool[:, blocks].transpose(1, 2).flatten(2, 3)  # [kv_heads, slots, head_dim]
            keys, values = (x.repeat_interleave(heads // len(keys), 0) for x in (keys, values))
            is_seen = self.group.mask(layer, Reach(window), torch.float64)[row, 0, 0, 0, : keys.shape[1]] == 0
            scores = (keys[:, is_seen] @ self.query[0, :, token].double()[..., None])[..., 0]
            scores = scores * (head_dim**-0.5 if scaling is None else scaling)
            values = values[:, is_seen]
            if seen is not None:
                scores = torch.cat((scores, seen[1][token].double()[:, None]), 1)
                values = torch.cat((values, seen[0][token].double()[:, None]), 1)
            found.append((scores.softmax(-1)[:, None] @ values)[:, 0])
        return torch.stack(found)

    def alone(self, row: int) -> Scene:
        group, num_blocks = self.group, int(self.group.row_blocks[row])
        return replace(
            self,
            query=self.query[:, :, self.tokens[row] : self.tokens[row] + 1].clone(),
            group=AttentionGroup(
                num_rows=1,
                query_index=torch.tensor([0]),
                kept=None,
                out_index=torch.tensor([0]),
                block_tables=group.block_tables[row : row + 1, :num_blocks].clone(),
                row_blocks=group.row_blocks[row : row + 1].clone(),
                query_positions=group.query_positions[row : row + 1].clone(),
                key_positions=group.key_positions[row : row + 1, : num_blocks * BLOCK_SIZE].clone(),
                is_causal=group.is_causal,
                hidden=tuple((0, hidden) for of, hidden in group.hidden if of == row),
            ),
        )

    def own_slots(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pool the blocks of a row and the offsets in them, a pair a slot."""
        blocks = self.group.block_tables[row, : int(self.group.row_blocks[row])]
        return blocks.repeat_interleave(BLOCK_SIZE), torch.arange(BLOCK_SIZE).repeat(len(blocks))


def make_scene(
    kernels: CpuKernels,
    dtype: torch.dtype = torch.float32,
    *,
    lengths: list[int] | None = None,
    num_virtual_tokens: int = 5,
    shared: int = 3,
    kv_heads: int = 2,
    head_dim: int = 16,
    is_causal: bool = True,
    hidden: tuple[tuple[int, Hidden], ...] = (),
) -> Scene:
    """Rows that see `lengths` tokens of their own behind a prefix, and have room for more."""
    lengths = LENGTHS if lengths is None else lengths
    contexts = [
        Context([(0, "decoder", num_virtual_tokens, 0)], num_virtual_tokens + torch.arange(n + i % 3 * 9).numpy())
        for i, n in enumerate(lengths)
    ]
    row_blocks = [num_blocks_for(num_virtual_tokens) + num_blocks_for(n) for n in lengths]
    num_blocks = 1 + sum(row_blocks)
    shape = ModelShape(2, kv_heads, head_dim, 64, 96, 4096, dtype, "scene", "none")
    kv_blocks = KVBlocks(shape, num_blocks, torch.device("cpu"), kernels)
    for i, layer in enumerate(kv_blocks.layers):
        layer.copy_(randn(*layer.shape, seed=10 + i))
    free = iter((torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(2)) + 1).tolist())
    tables = torch.zeros(len(lengths), max(row_blocks), dtype=torch.long)
    key_positions = torch.full((len(lengths), max(row_blocks) * BLOCK_SIZE), 2**30)
    for row, (n, context) in enumerate(zip(row_blocks, contexts, strict=True)):
        tables[row, :n] = torch.tensor([next(free) for _ in range(n)])
        key_positions[row, : n * BLOCK_SIZE] = torch.from_numpy(context.slot_positions[: n * BLOCK_SIZE])
    tokens = torch.randperm(len(lengths) + 4, generator=torch.Generator().manual_seed(3))[: len(lengths)]
    heads = kv_heads * shared
    product = randn(1, len(lengths) + 4, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=4)
    group = AttentionGroup(
        num_rows=len(lengths),
        query_index=tokens,
        kept=None,
        out_index=tokens,
        block_tables=tables,
        row_blocks=torch.tensor(row_blocks),
        query_positions=torch.tensor(lengths)[:, None] + num_virtual_tokens - 1,
        key_positions=key_positions,
        is_causal=is_causal,
        hidden=hidden,
    )
    return Scene(kv_blocks, group, product[:, :, :heads].transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [1, 3, 8, 16])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256, 512])
def test_attention(kernels: CpuKernels, head_dim: int, shared: int, dtype: torch.dtype) -> None:
    scene = make_scene(kernels, dtype, shared=shared, head_dim=head_dim)
    assert not scene.query.is_contiguous()
    check_near(scene.attended(), scene.expected())
    check_near(scene.attended(layer=1, scaling=0.09), scene.expected(layer=1, scaling=0.09))


@pytest.mark.parametrize("num_virtual_tokens", [1, 16, 130, 500])
def test_attention_behind_prefixes_of_any_length(kernels: CpuKernels, num_virtual_tokens: int) -> None:
    scene = make_scene(kernels, num_virtual_tokens=num_virtual_tokens)
    check_near(scene.attended(), scene.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 16, 130, 1000])
def test_attention_within_a_window(kernels: CpuKernels, window: int, dtype: torch.dtype) -> None:
    """Of 1 a query sees its own key; of 5 whole chunks of the longer rows are not seen."""
    scene = make_scene(kernels, dtype)
    check_near(scene.attended(window=window), scene.expected(window=window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_that_is_not_causal_sees_all_of_a_text(kernels: CpuKernels, dtype: torch.dtype) -> None:
    scene = make_scene(kernels, dtype, is_causal=False)
    causal = replace(scene, group=replace(scene.group, is_causal=True))
    check_near(scene.attended(), scene.expected())
    assert not torch.equal(scene.attended(), causal.attended())


def test_attention_of_layers_that_lack_a_part(kernels: CpuKernels) -> None:
    """One row's prefix is there in layer 1 only, another's in layer 0 only; one has all its chunk hidden."""
    hidden = (
        (2, Hidden(0, 5, frozenset({1}))),
        (5, Hidden(0, 5, frozenset({0}))),
        (15, Hidden(0, 200, frozenset({1}))),
    )
    scene = make_scene(kernels, hidden=hidden)
    whole = make_scene(kernels)
    for layer, lacking in ((0, [2, 15]), (1, [5])):
        found = scene.attended(layer=layer)
        check_near(found, scene.expected(layer=layer))
        differs = (found != whole.attended(layer=layer)).flatten(1).any(1)
        assert differs.nonzero()[:, 0].tolist() == lacking


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [1, 3, 16])
def test_attention_goes_on_from_what_was_seen(kernels: CpuKernels, shared: int, dtype: torch.dtype) -> None:
    """Some rows have seen nothing, and what stands there then does not count; some much, some little of the weight."""
    scene = make_scene(kernels, dtype, shared=shared)
    num_tokens, heads = scene.query.shape[2], scene.query.shape[1]
    out, lse = randn(num_tokens, heads, 16, seed=5), randn(num_tokens, heads, seed=6) * 8
    unseen = scene.tokens[::3]
    lse[unseen], out[unseen] = -INF, 0
    lse[scene.tokens[1]], lse[scene.tokens[4]] = 200, -200
    found = scene.attended(seen=(out, lse))
    check_near(found, scene.expected(seen=(out, lse)))
    check_near(found[::3], scene.expected()[::3])
    check_near(found[1].double(), out[scene.tokens[1]].double())


def test_keys_in_two_parts_are_attended_as_in_one(kernels: CpuKernels) -> None:
    """The prefix first, elsewhere, by the log-sum-exp of its scores; then the row's own text."""
    scene = make_scene(kernels, num_virtual_tokens=150)
    apart = replace(scene, group=replace(scene.group, key_positions=scene.group.key_positions.clone()))
    num_tokens, heads = scene.query.shape[2], scene.query.shape[1]
    out, lse = torch.zeros(num_tokens, heads, 16), torch.full((num_tokens, heads), -INF)
    for row, token in enumerate(scene.tokens):
        blocks, offsets = (x[:150] for x in scene.own_slots(row))
        pool = scene.kv_blocks.layers[0].view(2, -1, 2, BLOCK_SIZE, 16)
        keys, values = pool[:, blocks, :, offsets].permute(1, 2, 0, 3).repeat_interleave(heads // 2, 1)
        scores = (keys @ scene.query[0, :, token, :, None])[..., 0] / 4
        lse[token] = scores.logsumexp(-1)
        out[token] = (scores.softmax(-1)[:, None] @ values)[:, 0]
        apart.group.key_positions[row, :150] = 2**30
    check_near(apart.attended(seen=(out, lse)), scene.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "head_dim"), [(1, 16), (3, 64), (8, 128), (16, 80)])
def test_rows_attend_bitwise_the_same_beside_any_others_and_on_any_threads(
    kernels: CpuKernels, shared: int, head_dim: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    scene = make_scene(kernels, dtype, lengths=LENGTHS * 4, shared=shared, head_dim=head_dim)
    every = scene.attended()
    for row in (0, 3, 15, 16, 40, 63):
        assert same_bits(scene.alone(row).attended()[0], every[row])
    for num_threads in (2, 3, 4):
        threads(num_threads)
        assert same_bits(scene.attended(), every)
        assert same_bits(scene.alone(15).attended()[0], every[15])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["key", "value", "query", "seen"])
def test_what_is_not_finite_in_a_row_reaches_that_row_only(
    kernels: CpuKernels, where: str, value: float, dtype: torch.dtype
) -> None:
    scene = make_scene(kernels, dtype)
    num_tokens, heads = scene.query.shape[2], scene.query.shape[1]
    seen = (randn(num_tokens, heads, 16, seed=5), randn(num_tokens, heads, seed=6))
    before = scene.attended(seen=seen)
    for row in (0, 9, 15):
        bad, bad_seen = make_scene(kernels, dtype), (seen[0].clone(), seen[1].clone())
        token = scene.tokens[row]
        if where == "query":
            bad.query[0, :, token, 3] = value
        elif where == "seen":
            bad_seen[0][token] = value
            bad_seen[1][token] = NAN if value != value else 1.0
        else:
            blocks, offsets = bad.own_slots(row)
            pool = bad.kv_blocks.layers[0].view(2, -1, 2, BLOCK_SIZE, 16)
            pool[int(where == "value"), blocks[2], :, offsets[2], 3] = value
        found = bad.attended(seen=bad_seen)
        expected = bad.expected(seen=bad_seen)
        is_finite = found[row].isfinite().all(-1)  # an infinity in a key may be a weight of 0
        assert torch.equal(is_finite, expected[row].isfinite().all(-1))
        assert not is_finite.all()
        assert not (value != value and is_finite.any())
        others = [other for other in range(len(LENGTHS)) if other != row]
        assert same_bits(found[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0x7FFF, 0xFFC0 - 0x10000, 0xFF81 - 0x10000, -1])
def test_a_nan_in_a_value_survives_attention(kernels: CpuKernels, bits: int, dtype: torch.dtype) -> None:
    scene = make_scene(kernels, dtype, lengths=[30])
    pool = scene.kv_blocks.layers[0].view(2, -1, 2, BLOCK_SIZE, 16)
    nan = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
    pool[1, int(scene.group.block_tables[0, 0]), :, 2, 5] = nan.to(dtype)
    assert scene.attended()[..., 5].isnan().all()
    assert scene.attended()[..., 6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("window", [None, 40])
def test_what_stands_in_slots_that_are_not_seen_does_not_count(
    kernels: CpuKernels, window: int | None, value: float, dtype: torch.dtype
) -> None:
    """Behind a prefix's end, after the query, before the window, in parts that the layer lacks, in others' blocks."""
    hidden = ((9, Hidden(0, 5, frozenset({1}))),)
    scene, bad = (make_scene(kernels, dtype, hidden=hidden) for _ in range(2))
    pool = bad.kv_blocks.layers[0].view(2, -1, 2, BLOCK_SIZE, 16)
    is_seen = torch.zeros(pool.shape[1], BLOCK_SIZE, dtype=torch.bool)
    mask = bad.group.mask(0, Reach(window), torch.float32)[:, 0, 0, 0] == 0
    for row in range(len(LENGTHS)):
        blocks, offsets = bad.own_slots(row)
        is_seen[blocks, offsets] = mask[row, : len(blocks)]
    assert not is_seen.all()
    pool.masked_fill_(~is_seen[None, :, None, :, None], value)
    assert same_bits(bad.attended(window=window), scene.attended(window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e4, -1e4, 1e30])
def test_large_scores_give_finite_answers(kernels: CpuKernels, factor: float, dtype: torch.dtype) -> None:
    scene = make_scene(kernels, dtype)
    found = scene.attended(scaling=factor)
    assert found.isfinite().all()
    if abs(factor) < 1e5:  # the two best scores are far apart, and their rounding with them
        expected = scene.expected(scaling=factor)
        is_near = (found.double() - expected).abs().amax(-1) < 0.02 * expected.abs().amax()
        assert float(is_near.double().mean()) > 0.95


def test_scores_that_are_all_very_negative_or_equal_give_means(kernels: CpuKernels) -> None:
    scene = make_scene(kernels, lengths=[300])
    pool = scene.kv_blocks.layers[0].view(2, -1, 2, BLOCK_SIZE, 16)
    pool[0] = -1e4
    scene.query.fill_(1.0)
    check_near(scene.attended(scaling=1.0), scene.expected(scaling=1.0))
    check_near(scene.attended(scaling=0.0), scene.expected(scaling=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_written_keys_and_values_stand_where_torch_puts_them(
    kernels: CpuKernels, head_dim: int, dtype: torch.dtype
) -> None:
    """Views, of which keys and values have other strides; and tensors whose last dimension is not contiguous."""
    shape = ModelShape(2, 3, head_dim, 64, 96, 4096, dtype, "scene", "none")
    ours, theirs = (KVBlocks(shape, 9, torch.device("cpu"), kernels if fast else None) for fast in (True, False))
    assert theirs.kernels is None
    slots = torch.randperm(9 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0))[:50]
    product = randn(50, 5, head_dim, dtype=dtype)
    key, value = product[:, 1:4].transpose(0, 1), randn(3, 50, head_dim, dtype=dtype, seed=1)
    for k, v in ((key, value), (randn(3, head_dim, 50, dtype=dtype, seed=2).transpose(1, 2), value)):
        for kv_blocks in (ours, theirs):
            kv_blocks.write(1, kv_blocks.slots(slots // BLOCK_SIZE, slots % BLOCK_SIZE), k, v)
        assert all(same_bits(one, other) for one, other in zip(ours.layers, theirs.layers, strict=True))
    assert ours.layers[1].any()
    assert not ours.layers[0].any()


@pytest.mark.parametrize("wrong", ["key", "value"])
def test_keys_of_another_dtype_than_the_pools_are_refused(kernels: CpuKernels, wrong: str) -> None:
    """They would be written beyond their slots."""
    shape = ModelShape(1, 3, 16, 64, 96, 4096, torch.bfloat16, "scene", "none")
    kv_blocks = KVBlocks(shape, 4, torch.device("cpu"), kernels)
    kv = {name: randn(3, 1, 16, dtype=torch.float32 if name == wrong else torch.bfloat16) for name in ("key", "value")}
    slot = kv_blocks.slots(torch.tensor([3]), torch.tensor([15]))
    with pytest.raises((RuntimeError, AssertionError)):
        kv_blocks.write(0, slot, kv["key"], kv["value"])


def test_pools_that_the_kernels_do_not_fit_go_without(kernels: CpuKernels) -> None:
    shape = ModelShape(1, 2, 16, 64, 96, 4096, torch.float32, "scene", "none")
    cpu = torch.device("cpu")
    assert KVBlocks(shape, 4, cpu, kernels).kernels is kernels
    assert KVBlocks(shape, 4, torch.device("meta"), kernels).kernels is None
    for other in ({"head_dim": 24}, {"head_dim": 528}, {"dtype": torch.float16}, {"dtype": torch.float64}):
        assert KVBlocks(replace(shape, **other), 4, cpu, kernels).kernels is None


def check_missing(folder: Path, reason: str) -> None:
    with capture_logs() as logs:
        assert load_kernels(folder) is None
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("cpu_kernels_missing", "warning")]
    assert reason in logs[0]["reason"]


def test_without_a_compiler_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    check_missing(tmp_path, "no C compiler")
    monkeypatch.setenv("CC", "/nonexistent")
    check_missing(tmp_path, "/nonexistent")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("compiler", "reason"), [("false", "failed"), ("true", "kernels.so")])
def test_a_compiler_that_fails_gives_none(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    check_missing(tmp_path, reason)
    assert not list(tmp_path.iterdir())


def test_source_that_is_not_c_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.c"
    source.write_text("not C")
    monkeypatch.setattr(cpu_kernels, "SOURCE", source)
    check_missing(tmp_path / "built", "error")


def test_source_without_a_function_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.c"
    source.write_text("void rms_norm(void) {}")
    monkeypatch.setattr(cpu_kernels, "SOURCE", source)
    check_missing(tmp_path / "built", "silu_mul")


def test_a_folder_that_cannot_be_written_gives_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    check_missing(tmp_path / "file" / "kernels", "file")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Name and content of a library as it is kept."""
    folder = tmp_path_factory.mktemp("built")
    assert load_kernels(folder) is not None
    (path,) = folder.iterdir()
    return path.name, path.read_bytes()


def test_what_was_compiled_is_loaded_without_a_compiler(
    built: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content = built
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("CC", "/nonexistent")
    assert load_kernels(tmp_path) is not None


@pytest.mark.parametrize("broken", ["empty", "half", "a byte short", "a bit turned"])
def test_a_broken_library_is_compiled_again(built: tuple[str, bytes], broken: str, tmp_path: Path) -> None:
    name, content = built
    turned = bytearray(content)
    turned[len(content) // 3] ^= 4
    kept = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a byte short": content[:-1],
        "a bit turned": bytes(turned),
    }
    (tmp_path / name).write_bytes(kept[broken])
    kernels = load_kernels(tmp_path)
    assert kernels is not None
    assert kernels.argmax(torch.tensor([[1.0, 3.0, 2.0]])) == [1]
    assert (tmp_path / name).read_bytes() != kept[broken]


def test_two_that_start_at_once_compile_beside_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as starts:
        found = list(starts.map(load_kernels, [tmp_path / "kernels"] * 2))
    assert None not in found
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_folder_in_the_place_of_a_kept_library_is_compiled_anew(built: tuple[str, bytes], tmp_path: Path) -> None:
    name, _ = built
    (tmp_path / name / "inside").mkdir(parents=True)
    assert load_kernels(tmp_path) is not None
    assert (tmp_path / name).is_file()
