"""Artefacts of every kind, what is asked of them, and what the naive loop answers, on tiny models of both makes: alone,
composed, in ensembles, for some of the layers, in front of the text and behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefix_store.native_format import read_native, write_native
from prefix_store.prefix import Layers, ModelShape, Prefix
from tests import naive
from tests.cases import NEW_TOKENS, Case, Reference, tiny_shape
from tests.tiny_models import FAMILIES, HIDDEN, SEQ2SEQ_FAMILIES, VOCAB, seq2seq_model

SEPARATOR = 7
SUBSET = (1,)  # of the layers
Requests = dict[str, tuple[tuple[str, ...], ...]]  # of each row of a request, the names of its prefixes
CAUSAL: Requests = {
    "bare": ((),),
    "kv": (("kv",),),
    "soft": (("soft",),),
    "subset": (("subset",),),
    "soft infix": (("soft-infix",),),
    "kv infix": (("kv-infix",),),
    "subset infix": (("subset-infix",),),
    "prefix and soft infix": (("kv", "soft-infix"),),
    "prefix and kv infix": (("kv", "kv-infix"),),
    "soft prefix and kv infix": (("soft", "kv-infix"),),
    "two prefixes": (("kv", "kv-long"),),
    "the same two in the other order": (("kv-long", "kv"),),
    "a subset among three": (("kv", "subset", "kv-long"),),
    "ensemble": (("kv",), ("soft",), ("kv-long",), ("kv-infix",), ("subset", "kv")),
    "ensemble with the bare model": (("soft-infix",), ()),
}
SEQ2SEQ: Requests = {
    "bare": ((),),
    "three parts": (("three",),),
    "encoder only": (("encoder",),),
    "decoder only": (("decoder",),),
    "cross only": (("cross",),),
    "some encoder layers": (("some-encoder",),),
    "some decoder layers": (("some-decoder",),),
    "some cross layers": (("some-cross",),),
    "some layers of each": (("some-three",),),
    "soft": (("soft",),),
    "two of three parts": (("three", "three-long"),),
    "the same two in the other order": (("three-long", "three"),),
    "parts of different artefacts": (("encoder", "decoder", "some-cross"),),
    "a soft prompt behind keys": (("three", "soft"),),
    "ensemble": (("three",), ("soft",), ("encoder",), ("some-decoder", "cross"), ("three-long",)),
    "ensemble with the bare model": (("decoder",), ()),
}


def causal_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    generator = torch.Generator().manual_seed(11)

    def kv(n: int, layers: tuple[int, ...] | None = None, **fields: Any) -> Prefix:
        size = (shape.num_layers, 2, shape.num_kv_heads, n, shape.head_dim)
        made = torch.randn(size, generator=generator)
        return Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in layers or range(shape.num_layers)}, **fields)

    def soft(n: int, **fields: Any) -> Prefix:
        return Prefix("soft", embeddings=torch.randn(n, HIDDEN, generator=generator) * 0.6, **fields)

    infix = {"placement": "infix", "separator": SEPARATOR}
    return {
        "kv": kv(5),
        "kv-long": kv(19),
        "subset": kv(14, SUBSET),
        "soft": soft(4),
        "soft-infix": soft(3, placement="infix"),
        "kv-infix": kv(17, **infix),
        "subset-infix": kv(4, SUBSET, **infix),
    }


def seq2seq_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    generator = torch.Generator().manual_seed(12)

    def kv(n: int, num_layers: int, layers: tuple[int, ...] = ()) -> Layers:
        made = torch.randn((num_layers, 2, shape.num_kv_heads, n, shape.head_dim), generator=generator)
        return {i: (made[i, 0], made[i, 1]) for i in layers or range(num_layers)}

    def prefix(encoder: int = 0, decoder: int = 0, cross: int = 0, layers: tuple[int, ...] = ()) -> Prefix:
        return Prefix(
            "kv",
            kv(decoder, shape.num_layers, layers) if decoder else {},
            encoder=kv(encoder, shape.num_encoder_layers, layers) if encoder else {},
            cross=kv(cross, shape.num_layers, layers) if cross else {},
            is_seq2seq=True,
        )

    return {
        "three": prefix(4, 6, 5),
        "three-long": prefix(18, 3, 17),
        "encoder": prefix(encoder=7),
        "decoder": prefix(decoder=17),
        "cross": prefix(cross=6),
        "some-encoder": prefix(encoder=5, layers=SUBSET),
        "some-decoder": prefix(decoder=6, layers=SUBSET),
        "some-cross": prefix(cross=7, layers=SUBSET),
        "some-three": prefix(3, 5, 4, layers=SUBSET),
        "soft": Prefix("soft", embeddings=torch.randn(5, HIDDEN, generator=generator) * 0.6, is_seq2seq=True),
    }


def make_reference(family: str, folder: Path) -> Reference:
    """Prefixes pass through the native file, as they are served."""
    torch.manual_seed(6)
    if family in FAMILIES:
        requests, made, kind = CAUSAL, causal_prefixes, AutoModelForCausalLM
        model = kind.from_config(FAMILIES[family]()).float()
    else:
        requests, made, kind = SEQ2SEQ, seq2seq_prefixes, AutoModelForSeq2SeqLM
        config: Any = SEQ2SEQ_FAMILIES[family]()
        deeper = "decoder_layers" if family == "bart" else "num_decoder_layers"
        setattr(config, deeper, getattr(config, deeper) + 1)  # no part has the other's number of layers
        model = seq2seq_model(config)
    model.save_pretrained(folder)
    plain = kind.from_pretrained(folder, attn_implementation=naive.NAME).eval()
    shape = tiny_shape(plain)
    prefixes = {name: read_native(write_native(prefix), shape) for name, prefix in made(shape).items()}
    cases = []
    for i, (name, members) in enumerate(requests.items()):
        prompt = torch.randint(3, VOCAB, (2 + 5 * i % 31,)).tolist()
        tokens, logits = naive.generate(plain, prompt, [[prefixes[p] for p in row] for row in members], NEW_TOKENS)
        cases.append(Case(name, prompt, members, tokens, logits))
    return Reference(folder, prefixes, cases)
