"""The native file of every kind and part: what is written is what is read, to the digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from prefix_store.native_format import digest_of, read_native, write_native
from prefix_store.prefix import Layers, ModelShape, Prefix
from prefix_store.safetensors_header import read_header

LAYERS, HEADS, DIM, HIDDEN = 3, 2, 8, 48
SHAPE = ModelShape(LAYERS, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64)
SEQ2SEQ = replace(SHAPE, num_encoder_layers=4)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def kv(n: int, *layers: int, seed: int = 0) -> Layers:
    return {i: (random(HEADS, n, DIM, seed=seed + 2 * i), random(HEADS, n, DIM, seed=seed + 2 * i + 1)) for i in layers}


ENCODER, CROSS = kv(7, 0, 1, 2, 3, seed=20), kv(2, 0, 2, seed=40)
PREFIXES = {
    "kv": Prefix("kv", kv(5, 0, 1, 2)),
    "subset": Prefix("kv", kv(5, 2, 0)),
    "kv infix": Prefix("kv", kv(5, 0, 1, 2), placement="infix", separator=0),
    "soft": Prefix("soft", embeddings=random(6, HIDDEN)),
    "soft infix": Prefix("soft", embeddings=random(6, HIDDEN), placement="infix"),
    "named": Prefix("soft", embeddings=random(6, HIDDEN), base_model="owner/tiny", fingerprint="a" * 64),
    "encoder": Prefix("kv", encoder=ENCODER, is_seq2seq=True),
    "decoder": Prefix("kv", kv(5, 0, 1, 2), is_seq2seq=True),
    "cross": Prefix("kv", cross=CROSS, is_seq2seq=True),
    "all parts": Prefix("kv", kv(5, 1), encoder=ENCODER, cross=CROSS, is_seq2seq=True, base_model="owner/tiny"),
    "encoder soft": Prefix("soft", embeddings=random(6, HIDDEN), is_seq2seq=True),
}


def converted(prefix: Prefix, change: Callable[[torch.Tensor], torch.Tensor]) -> Prefix:
    """Every tensor changed."""

    def each(layers: Layers) -> Layers:
        return {i: (change(key), change(value)) for i, (key, value) in layers.items()}

    embeddings = None if prefix.embeddings is None else change(prefix.embeddings)
    return replace(
        prefix,
        layers=each(prefix.layers),
        encoder=each(prefix.encoder),
        cross=each(prefix.cross),
        embeddings=embeddings,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PREFIXES)
def test_what_is_written_is_what_is_read(name: str, dtype: torch.dtype) -> None:
    prefix = converted(PREFIXES[name], lambda tensor: tensor.to(dtype))
    body = write_native(prefix)
    found = read_native(body, SEQ2SEQ if prefix.is_seq2seq else SHAPE)
    assert digest_of(write_native(found)) == digest_of(body)
    assert found.layout == prefix.layout
    assert (found.base_model, found.fingerprint) == (prefix.base_model, prefix.fingerprint)
    for (part, layers), (other, others) in zip(found.parts(), prefix.parts(), strict=True):
        assert part == other
        assert list(layers) == sorted(others)
        for layer, pair in layers.items():
            for ours, theirs in zip(pair, others[layer], strict=True):
                assert ours.dtype == theirs.dtype == dtype
                assert ours.shape == theirs.shape
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    if prefix.embeddings is not None:
        assert found.embeddings is not None
        assert torch.equal(found.embeddings.view(torch.uint8), prefix.embeddings.view(torch.uint8))


@pytest.mark.parametrize("name", PREFIXES)
def test_digest_depends_on_the_content_alone(name: str) -> None:
    prefix = PREFIXES[name]
    body = write_native(prefix)
    shuffled = replace(
        prefix,
        layers=dict(reversed(list(prefix.layers.items()))),
        encoder=dict(reversed(list(prefix.encoder.items()))),
        cross=dict(reversed(list(prefix.cross.items()))),
    )
    assert write_native(shuffled) == body
    strided = converted(prefix, lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    assert write_native(strided) == body
    others_file = safetensors.torch.save(safetensors.torch.load(body), _metadata(body))
    found = read_native(others_file, SEQ2SEQ if prefix.is_seq2seq else SHAPE)
    assert write_native(found) == body


def test_digests_tell_kinds_and_places_apart() -> None:
    one = kv(5, 0, 1, 2)
    bodies = [
        write_native(prefix)
        for prefix in (
            *PREFIXES.values(),
            Prefix("kv", one, is_seq2seq=True, base_model="x"),
            Prefix("kv", encoder=one, is_seq2seq=True),
            Prefix("kv", cross=one, is_seq2seq=True),
            Prefix("kv", one, placement="infix", separator=1),
            Prefix("kv", {i: (value, key) for i, (key, value) in one.items()}),
        )
    ]
    assert len({digest_of(body) for body in bodies}) == len(bodies)


def _metadata(body: bytes) -> dict[str, str]:
    return dict(read_header(body).metadata)
