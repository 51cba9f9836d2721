"""Does a request fit the model's positions and its vocabulary? Known before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from prefix_store.prefix import ModelShape
from server.engine.errors import PromptTooLongError, UnknownTokenError
from server.engine.sequence import Composition


def max_new_tokens(shape: ModelShape, prefixes: Composition, num_prompt_tokens: int, num_start_tokens: int) -> int:
    """How many tokens a row can generate. `num_start_tokens` is what an encoder-decoder's own text begins with."""
    layouts = [ref.layout for ref in prefixes]
    num_read = num_start_tokens
    if not shape.is_encoder_decoder:
        num_read = num_prompt_tokens + sum(layout.separator is not None for layout in layouts)
    return shape.max_positions - sum(layout.num_decoder_tokens for layout in layouts) - num_read


def check_context(
    shape: ModelShape, prefixes: Composition, num_prompt_tokens: int, num_start_tokens: int, num_wanted: int
) -> None:
    """Raises PromptTooLongError, with what was counted, for a row that could not generate the tokens wanted."""
    if num_prompt_tokens == 0:
        raise PromptTooLongError("the prompt must have at least one token, got 0")
    limit = shape.max_positions
    layouts = [ref.layout for ref in prefixes]
    num_encoder = sum(layout.num_encoder_tokens for layout in layouts)
    num_decoder = sum(layout.num_decoder_tokens for layout in layouts)
    num_virtual = max(num_encoder, num_decoder, sum(layout.num_cross_tokens for layout in layouts))
    if num_virtual > shape.max_virtual_tokens:
        raise PromptTooLongError(
            f"virtual tokens of {len(prefixes)} prefixes together must be <= {shape.max_virtual_tokens}, "
            f"got {num_virtual}"
        )
    num_left = max_new_tokens(shape, prefixes, num_prompt_tokens, num_start_tokens)
    if shape.is_encoder_decoder:
        if num_encoder + num_prompt_tokens > limit:
            raise PromptTooLongError(
                f"encoder: virtual tokens ({num_encoder}) + prompt tokens ({num_prompt_tokens}) must be <= {limit}"
            )
        stack, read = "decoder: ", "start tokens"
    else:
        stack, read = "", "prompt tokens"
    if num_wanted > num_left:
        raise PromptTooLongError(
            f"{stack}virtual tokens ({num_decoder}) + {read} ({limit - num_left - num_decoder}) + max_new_tokens "
            f"({num_wanted}) must be <= {limit}"
        )


def check_vocabulary(shape: ModelShape, token_ids: Sequence[int | None]) -> None:
    """Raises UnknownTokenError for a token that is none (text that the tokenizer has no token for), or that the model
    has no embedding for."""
    for token_id in token_ids:
        if token_id is None or not 0 <= token_id < shape.vocab_size:
            raise UnknownTokenError(
                f"the prompt's tokens must be among the model's {shape.vocab_size}, its tokenizer gives {token_id}"
            )
