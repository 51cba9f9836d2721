"""caikit's prompt vectors, as IBM's text generation server reads them: `decoder.pt`, `encoder.pt`."""

from __future__ import annotations

import torch

from prefix_store.converters.weights_file import plain_tensor
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix

DECODER, ENCODER = "decoder.pt", "encoder.pt"


def is_prompt_vector(found: object) -> bool:
    """A tensor alone, or a dict of one entry that is a tensor."""
    if isinstance(found, dict):
        return len(found) == 1 and isinstance(next(iter(found.values())), torch.Tensor)
    return isinstance(found, torch.Tensor)


def read_prompt_vector(name: str, found: object, shape: ModelShape) -> Prefix:
    """`[n, hidden]`, of an encoder-decoder `encoder.pt` alone. Raises InvalidArtefactError."""
    if name == ENCODER and not shape.is_encoder_decoder:
        raise encoder_decoder_error(f"{ENCODER} is the soft prompt of an encoder")
    if name != ENCODER and shape.is_encoder_decoder:
        raise InvalidArtefactError(
            f"expected {ENCODER}, the soft prompt before the encoder's text, got {name}: {shape.model_name} is an "
            "encoder-decoder, and soft prompts on its decoder are not served"
        )
    tensor = plain_tensor(name, next(iter(found.values())) if isinstance(found, dict) else found)
    if tensor.dim() != 2 or tensor.shape[1] != shape.hidden_size:
        raise InvalidArtefactError(
            f"{name}: expected [num_virtual_tokens, {shape.hidden_size}], got {list(tensor.shape)}"
        )
    # cloned: caikit saves a slice, and the rows behind it come along
    embeddings = tensor.clone(memory_format=torch.contiguous_format)
    return Prefix("soft", embeddings=embeddings, is_seq2seq=shape.is_encoder_decoder)


def encoder_decoder_error(what: str) -> InvalidArtefactError:
    return InvalidArtefactError(f"expected an artefact of a decoder-only model, got an encoder-decoder's: {what}")
