"""The measures of a model that artefacts, requests and memory must fit: asked of the model itself."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from prefix_store.prefix import LayerShape, ModelShape, Reads
from server.engine.attention_probe import NUM_TOKENS as NUM_PROBED_TOKENS
from server.engine.attention_probe import Handed, ask, ask_seq2seq, probed_ids, reach_of, recording
from server.engine.errors import ModelRefusedError, one_line
from server.engine.reach import WHOLE, Reach

MAX_RELATIVE_POSITIONS = 4096  # of a model whose positions have no end of their own
STATEFUL = ("Mamba", "Mixer", "ShortConv", "Delta", "Recurrent", "LinearAttention", "Lightning", "KDA", "LSTM")
RECURRENT = "it has recurrent or convolution layers, whose state would pass from one packed row to the next"
OWN_ATTENTION = "it has attention of its own, which cannot be replaced"


def measure_shape(
    model: Any, model_name: str, fingerprint: str, aliases: tuple[str, ...] = (), max_virtual_tokens: int = 4096
) -> ModelShape:
    """The measures that an artefact must fit: positions from the model's config, all others from what the model hands
    to its attention. Raises ModelRefusedError."""
    is_seq2seq = bool(model.config.is_encoder_decoder)
    config = model.config if is_seq2seq else model.config.get_text_config()
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is None and is_seq2seq:
        max_positions = getattr(config, "n_positions", MAX_RELATIVE_POSITIONS)  # T5 has biases of distances
    has_end = max_positions is not None
    max_positions = int(min(max_positions or MAX_RELATIVE_POSITIONS, _max_even_positions(config)))
    calls = _ask(model, max_positions - NUM_PROBED_TOKENS)
    layers = _measure_layers(model, calls, max_positions)
    if not has_end:
        raise ModelRefusedError("its config names no largest position")
    widest = max(layers, key=lambda layer: layer.key_dim)
    is_uniform = all(layer == replace(widest, source=index) for index, layer in enumerate(layers))
    return ModelShape(
        num_layers=len(layers),
        num_encoder_layers=config.num_hidden_layers if is_seq2seq else 0,
        num_kv_heads=widest.num_kv_heads,
        head_dim=widest.key_dim,
        reads=_measure_reads(model),
        takes_keys=is_seq2seq or all(handed.is_cached for handed in calls),
        layers=() if is_uniform and widest.key_dim == widest.value_dim and widest.sees_all else tuple(layers),
        hidden_size=model.get_input_embeddings().embedding_dim,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_positions=max_positions,
        dtype=model.dtype,
        model_name=model_name,
        fingerprint=fingerprint,
        model_aliases=aliases,
        max_virtual_tokens=max_virtual_tokens,
    )


def _ask(model: Any, position: int) -> list[Handed]:
    """What its layers hand to their attention. Raises ModelRefusedError."""
    try:
        calls = ask_seq2seq(model) if model.config.is_encoder_decoder else ask(model, 0)
        if not calls:
            raise ModelRefusedError(OWN_ATTENTION)
        if not model.config.is_encoder_decoder:
            calls = ask(model, position)
    except ModelRefusedError:
        raise
    except Exception as error:  # a family's own, about masks, caches and inputs that it makes something else of
        raise ModelRefusedError(_why_unanswered(model, error)) from error
    return calls


def _measure_layers(model: Any, calls: list[Handed], max_positions: int) -> list[LayerShape]:
    """The measures of each decoder layer. Raises ModelRefusedError for layers that packed rows cannot serve."""
    if unknown := {name for handed in calls for name in handed.unknown}:
        raise ModelRefusedError(f"its attention depends on {', '.join(sorted(unknown))}, which packed rows do not have")
    found_reaches: dict[object, Reach] = {}  # layers of one kind are handed one mask
    for handed in calls:
        if handed.mask not in found_reaches:
            found_reaches[handed.mask] = reach_of(handed, max_positions - 1)
    reaches = [found_reaches[handed.mask] for handed in calls]
    if model.config.is_encoder_decoder:
        shapes = {(handed.key.shape[1], handed.key.shape[3], handed.value.shape[3]) for handed in calls}
        if len(shapes) > 1 or any(reach != WHOLE for reach in reaches):
            raise ModelRefusedError("expected the same heads in encoder and decoder, and no windows")
    found: dict[int, LayerShape] = {}
    sources: dict[int, int] = {}  # the first layer that handed on a tensor of keys
    for handed, reach in zip(calls, reaches, strict=True):
        if handed.module.is_causal:
            if handed.layer in found:
                raise ModelRefusedError(
                    f"layer {handed.layer} attends more than once, over values of its own each time"
                )
            _, num_kv_heads, _, key_dim = handed.key.shape
            source = sources.setdefault(id(handed.key), handed.layer)
            value_dim = handed.value.shape[3]
            found[handed.layer] = LayerShape(num_kv_heads, key_dim, value_dim, source, reach.window, reach.chunk)
    num_layers = _num_decoder_layers(model.config)
    if not found:
        raise ModelRefusedError("its attention is not causal: a token sees those after it")
    if silent := sorted(set(range(num_layers)) - set(found)):
        raise ModelRefusedError(_why_silent(model, silent))
    layers = [found[index] for index in range(num_layers)]
    _check_cache(model, layers, max_positions)
    return layers


def _check_cache(model: Any, layers: list[LayerShape], max_positions: int) -> None:
    """Raises ModelRefusedError where the model's own cache forgets keys that its masks still show (Moshi): then what a
    token sees depends on whether the text came at once."""
    if model.config.is_encoder_decoder:
        return
    for index, (layer, cached) in enumerate(zip(layers, DynamicCache(config=model.config).layers, strict=False)):
        kept = getattr(cached, "sliding_window", None)
        seen = layer.window or layer.chunk
        if kept is not None and min(seen or max_positions, max_positions) > kept:
            raise ModelRefusedError(f"layer {index} keeps {kept} tokens in its cache and masks none of those before")


def _why_unanswered(model: Any, error: Exception) -> str:
    if _has_module(model, "Indexer"):
        return "its attention picks keys by their content (a sparse indexer), which packed rows do not have"
    if _has_module(model, *STATEFUL):
        return RECURRENT
    if isinstance(error, IndexError):
        return "its layers keep something else than keys and values in their cache"
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return OWN_ATTENTION
    if "MaskRule" in str(error):
        return "its layers make masks of their own, which packed rows do not have"
    return f"its layers cannot be asked what they attend to ({one_line(error)})"


def _why_silent(model: Any, layers: list[int]) -> str:
    if _has_module(model, *STATEFUL):
        return RECURRENT
    return f"layers {layers} have attention of their own, which cannot be replaced"


def _has_module(model: Any, *names: str) -> bool:
    """Whether a class of its modules has one of `names` in its own."""
    return any(name in type(module).__name__ for module in model.modules() for name in names)


@torch.inference_mode()
def _measure_reads(model: Any) -> Reads:
    """Whether ids and their embeddings come to the same in the stack that a soft prompt stands before."""
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    if model.device.type == "meta":
        return "either"
    special = {value for name, value in vars(model.config).items() if name.endswith("_token_id") and _is_id(value)}
    num_tokens = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[*probed_ids(model), *(i for i in special if i < num_tokens)]], device=model.device)
    more: dict[str, Any] = {"use_cache": False}
    if not model.config.is_encoder_decoder:
        more["logits_to_keep"] = torch.arange(ids.shape[1], device=model.device)
    with recording(model):
        by_ids = stack(input_ids=ids, **more)[0]
    embedded = stack.get_input_embeddings()(ids)
    try:
        with recording(model):
            by_embeddings = stack(inputs_embeds=embedded, **more)[0]
            stack(inputs_embeds=embedded + 0.5, **more)  # which no token has
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of a family that wants ids, in words of its own
        return "ids"
    return "either" if torch.equal(by_ids, by_embeddings) else "each"


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _num_decoder_layers(config: Any) -> int:
    if not config.is_encoder_decoder:
        return int(config.get_text_config().num_hidden_layers)
    names = ("num_decoder_layers", "decoder_layers")
    return int(next((n for name in names if (n := getattr(config, name, None))), config.num_hidden_layers))


def _max_even_positions(config: Any) -> float:
    """Up to which a position is turned alike whatever other rows do: longrope has other frequencies for all rows of a
    step in which one is beyond this."""
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    if all(rope.get("rope_type") != "longrope" for rope in ropes):
        return math.inf
    found = [rope.get("original_max_position_embeddings") for rope in ropes]
    found.append(getattr(config, "original_max_position_embeddings", None))
    return min((each for each in found if each), default=math.inf)
