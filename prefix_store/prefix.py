"""The trained artefact (`Prefix`), what admission must know of it (`Layout`), and the model that it must fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["kv", "soft"]
Placement = Literal["prefix", "infix"]
# What a model accepts as text. `either`: ids or their embeddings, with equal results. `each`: both, with results that
# differ. `ids`: no embeddings.
Reads = Literal["either", "each", "ids"]
Layers = Mapping[int, "tuple[torch.Tensor, torch.Tensor]"]
PARTS = ("decoder", "encoder", "cross")


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's attention: heads and widths of its keys and values, the layer whose keys and values it reads
    (`source`, itself in most models), and how far back its queries see: `window` positions, or their own chunk of
    `chunk` positions; None: all."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    source: int
    window: int | None = None
    chunk: int | None = None

    @property
    def sees_all(self) -> bool:
        return self.window is None and self.chunk is None


@dataclass(frozen=True)
class ModelShape:
    """What an artefact is validated against. The server makes it from the loaded model.

    `dtype` is the dtype the model computes in: values must stay finite after a cast to it. An encoder-decoder has
    `num_encoder_layers`; its heads are the same everywhere. `num_kv_heads` and `head_dim` are those of the layer with
    the widest keys. A model whose cache holds something else than keys and values (`takes_keys` is false) has no KV
    prefixes. `layers` has the measures of each decoder layer, and is empty where all layers are alike and see all.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    model_name: str
    fingerprint: str
    model_aliases: tuple[str, ...] = ()
    max_virtual_tokens: int = 4096
    num_encoder_layers: int = 0
    layers: tuple[LayerShape, ...] = ()
    reads: Reads = "either"
    takes_keys: bool = True

    @property
    def is_encoder_decoder(self) -> bool:
        return self.num_encoder_layers > 0

    def layer(self, index: int) -> LayerShape:
        if self.layers:
            return self.layers[index]
        return LayerShape(self.num_kv_heads, self.head_dim, self.head_dim, source=index)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Decoder layers with keys and values of their own."""
        return tuple(index for index in range(self.num_layers) if self.layer(index).source == index)


@dataclass(frozen=True)
class Layout:
    """Lengths and place of an artefact, known before it is loaded. A soft prompt's rows count for the stack that it
    stands before: the encoder of an encoder-decoder, else the decoder."""

    kind: Kind = "kv"
    placement: Placement = "prefix"
    separator: int | None = None
    num_decoder_tokens: int = 0
    num_encoder_tokens: int = 0
    num_cross_tokens: int = 0

    @property
    def stays_embeddings(self) -> bool:
        """A soft prompt whose K and V depend on the text: after it (infix), or in an encoder, where all see all."""
        return self.kind == "soft" and (self.placement == "infix" or self.num_encoder_tokens > 0)

    @property
    def num_virtual_tokens(self) -> int:
        """Of the longest part."""
        return max(self.num_decoder_tokens, self.num_encoder_tokens, self.num_cross_tokens)


@dataclass(frozen=True, eq=False)
class Prefix:
    """One trained prefix, in its source form.

    `layers[i]` is `(key, value)` of the decoder's self-attention, each `[num_kv_heads, num_virtual_tokens, head_dim]`;
    a layer that is not in the mapping sees no prefix. `encoder` and `cross` are the same for an encoder-decoder's
    encoder and its cross-attention. `embeddings` is `[num_virtual_tokens, hidden_size]`, in front of the text that
    the model reads. A prefix has embeddings or layers, by `kind`.
    """

    kind: Kind
    layers: Layers = field(default_factory=dict)
    embeddings: torch.Tensor | None = None
    encoder: Layers = field(default_factory=dict)
    cross: Layers = field(default_factory=dict)
    placement: Placement = "prefix"
    separator: int | None = None
    is_seq2seq: bool = False  # of an encoder-decoder: its embeddings stand before the encoder's text
    base_model: str | None = None
    fingerprint: str | None = None

    def parts(self) -> Iterator[tuple[str, Layers]]:
        """The KV parts that there are, by name."""
        for name, layers in zip(PARTS, (self.layers, self.encoder, self.cross), strict=True):
            if layers:
                yield name, layers

    @property
    def layout(self) -> Layout:
        lengths = {name: _length(layers) for name, layers in self.parts()}
        if self.embeddings is not None:
            lengths["encoder" if self.is_seq2seq else "decoder"] = self.embeddings.shape[0]
        return Layout(
            kind=self.kind,
            placement=self.placement,
            separator=self.separator,
            num_decoder_tokens=lengths.get("decoder", 0),
            num_encoder_tokens=lengths.get("encoder", 0),
            num_cross_tokens=lengths.get("cross", 0),
        )

    @property
    def num_virtual_tokens(self) -> int:
        return self.layout.num_virtual_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the source form in memory."""
        tensors = [t for _, layers in self.parts() for pair in layers.values() for t in pair]
        if self.embeddings is not None:
            tensors.append(self.embeddings)
        return sum(t.numel() * t.element_size() for t in tensors)


def _length(layers: Layers) -> int:
    key, _ = next(iter(layers.values()))
    return key.shape[1]
