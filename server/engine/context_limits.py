"""Does a request fit the model's positions and its vocabulary? Known before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from prefix_store.prefix import ModelShape
from server.engine.errors import ContextLengthError, PromptTooLongError, UnknownTokenError
from server.engine.sequence import Composition


def max_new_tokens(shape: ModelShape, prefixes: Composition, num_prompt_tokens: int, num_start_tokens: int) -> int:
    """How many tokens a row can generate. `num_start_tokens` is what an encoder-decoder's own text begins with."""
    layouts = [ref.layout for ref in prefixes]
    num_read = num_start_tokens
    if not shape.is_encoder_decoder:
        num_read = num_prompt_tokens + sum(layout.separator is not None for layout in layouts)
    return shape.max_positions - sum(layout.num_decoder_tokens for layout in layouts) - num_read


def check_context(
    shape: ModelShape,
    prefixes: Composition,
    num_prompt_tokens: int,
    num_start_tokens: int,
    num_wanted: int,
    *,
    is_least: bool = False,
) -> None:
    """Raises ContextLengthError, with what was counted, for a row that could not generate the tokens wanted, and
    PromptTooLongError for prefixes that are too long together or a prompt without tokens.

    `is_least`: the prompt has `num_prompt_tokens` or more. It is refused if it leaves room for no token at all.
    """
    if num_prompt_tokens == 0 and not is_least:
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
    at_least = "at least " if is_least else ""
    if shape.is_encoder_decoder:
        if num_encoder + num_prompt_tokens > limit:
            raise ContextLengthError(
                f"encoder: virtual tokens ({num_encoder}) + prompt tokens ({at_least}{num_prompt_tokens}) "
                f"must be <= {limit}",
                limit=limit,
                num_read=num_prompt_tokens,
                num_virtual=num_encoder,
                is_least=is_least,
            )
        stack, read, at_least = "decoder: ", "start tokens", ""
    else:
        stack, read = "", "prompt tokens"
    if num_left < (1 if is_least else num_wanted):
        num_read = limit - num_left - num_decoder
        raise ContextLengthError(
            f"{stack}virtual tokens ({num_decoder}) + {read} ({at_least}{num_read}) + max_new_tokens "
            f"({num_wanted}) must be <= {limit}",
            limit=limit,
            num_read=num_read,
            num_virtual=num_decoder,
            num_new=num_wanted,
            reads_start=shape.is_encoder_decoder,
            is_least=bool(at_least),
        )


def check_vocabulary(shape: ModelShape, token_ids: Sequence[int | None]) -> None:
    """Raises UnknownTokenError for a token that is none (text that the tokenizer has no token for), or that the model
    has no embedding for."""
    for token_id in token_ids:
        if token_id is None or not 0 <= token_id < shape.vocab_size:
            raise UnknownTokenError(
                f"the prompt's tokens must be among the model's {shape.vocab_size}, its tokenizer gives {token_id}"
            )
