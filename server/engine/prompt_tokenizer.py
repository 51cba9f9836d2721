"""Prompts and chats to token ids; which control tokens a caller's text may hold."""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from tokenizers import AddedToken

from server.engine.chat_template import Message, Messages, passed_over
from server.engine.errors import ChatRefusedError, ModelRefusedError
from server.engine.token_bound import has_plain_backend, token_bound
from server.engine.token_texts import special_token_ids

CheckLength = Callable[[int, bool], None]  # of a number of tokens, or (True) of at least so many; raises
ControlTokens = Literal["allow", "split"]
AROUND = ("{}", "a{}b", " {} ", "\n{}\n")  # where a control token must read as plain text
FIXED, ARGUMENTS = ("role", "type"), "arguments"
EDGE, CONTROL = "\U00100000", "\U00100001"  # private-use characters; a number nobody can guess follows


class PromptTokenizer:
    """The model's tokenizer as prompts are read with it.

    With `allow` a control token's name in a text is that control token, as in transformers. With `split` it is plain
    text in what callers send, and a control token where the chat template writes it. Raises ModelRefusedError for a
    tokenizer that cannot do that.
    """

    def __init__(self, tokenizer: Any, control_tokens: ControlTokens = "allow") -> None:
        self._source = tokenizer
        self._bound = token_bound(tokenizer)
        self._tokenizer, self._chat = tokenizer, None
        if control_tokens == "split":
            self._tokenizer = _splitting(tokenizer)
            _check_splits(self._tokenizer)
            self._chat = SplitChat(tokenizer) if tokenizer.chat_template else None
        self._ids = _reader(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._source.chat_template)

    def least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, before any work is done on it."""
        return 0 if self._bound is None else self._bound.least_tokens(text)

    def ids(self, text: str, check: CheckLength) -> list[int]:
        """A prompt's. Raises what `check` raises, before a list is made."""
        return self._ids(text, check)

    def chat_ids(self, messages: Messages, check: CheckLength) -> list[int]:
        """A conversation's, through the model's chat template. Raises also ChatRefusedError, where the template leaves
        out what tools were asked or answered too."""
        text = _render(self._source, messages)
        check(self.least_tokens(text), True)
        if field := passed_over(partial(_render, self._source), messages, text):
            raise ChatRefusedError(f"{field} has no place in the model's chat template", field)
        if self._chat is not None:
            return self._chat.ids(text, messages, check)
        return self._ids(text, check, add_special_tokens=False)


class SplitChat:
    """A chat template whose own control tokens are told from those in the messages.

    The messages' control tokens are taken out, and the ends of each message marked, before the template is rendered:
    what control tokens are there then are the template's. For these stand added tokens of a copy of the tokenizer that
    reads all other control tokens as text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not has_plain_backend(tokenizer):
            raise ModelRefusedError(
                "special-tokens-in-text split: a chat template needs a tokenizer of the package `tokenizers`, "
                f"got {type(tokenizer).__name__}; use allow"
            )
        self._source = tokenizer
        nonce = str(secrets.randbits(128))
        control = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._edge = f"{EDGE}{nonce}{EDGE}"
        self._names = [token.content for token in control.values()]
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) or r"(?!)")
        self._taken_out = {name: f"{EDGE}{nonce}{CONTROL}{index}{EDGE}" for index, name in enumerate(self._names)}
        self._taken_out_pattern = re.compile(f"{EDGE}{nonce}{CONTROL}([0-9]+){EDGE}")
        self._written = {name: f"{CONTROL}{nonce}{CONTROL}{index}{CONTROL}" for index, name in enumerate(self._names)}
        marked = _splitting(tokenizer)
        first_id = len(marked)
        for token in control.values():
            strips = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            written = self._written[token.content]
            marked.add_tokens(AddedToken(written, normalized=token.normalized, special=False, **strips))
        self._ids = _reader(marked)
        self._control_ids = dict(zip(marked.convert_tokens_to_ids([*self._written.values()]), control, strict=True))
        assert min(self._control_ids, default=first_id) >= first_id
        self._check()

    def ids(self, text: str, messages: Messages, check: CheckLength) -> list[int]:
        """Of `messages`, which the template renders as `text`. Raises ChatRefusedError where a template does more with
        a message than write it down."""
        rendered = _render(self._source, [self._marked(message) for message in messages])
        plain = self._restored(rendered.replace(self._edge, ""))
        if plain != text:
            raise ChatRefusedError(
                "special-tokens-in-text split: the model's chat template must write a message as it is, "
                "or without the space around it; it changes one of these"
            )
        num_written = 0

        def written(match: re.Match[str]) -> str:
            nonlocal num_written
            num_written += 1
            return self._written[match[0]]

        marked = self._pattern.sub(written, rendered)
        ids = self._ids(self._restored(marked.replace(self._edge, "")), check, add_special_tokens=False)
        if sum(token_id in self._control_ids for token_id in ids) != num_written:
            raise ChatRefusedError(
                "special-tokens-in-text split: the tokenizer does not read the control tokens of the model's chat "
                "template where they stand"
            )
        return [self._control_ids.get(token_id, token_id) for token_id in ids]

    def _marked(self, message: Message) -> Message:
        return {name: value if name in FIXED else self._marked_value(value, name) for name, value in message.items()}

    def _marked_value(self, value: Any, name: str) -> Any:
        """A tool's arguments have names that callers choose."""
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, list):
            return [self._marked_value(each, name) for each in value]
        if isinstance(value, dict):
            if name != ARGUMENTS:
                return self._marked(value)
            return {self._marked_text(key): self._marked_value(each, name) for key, each in value.items()}
        return value

    def _marked_text(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        taken_out = self._pattern.sub(lambda match: self._taken_out[match[0]], core)
        return f"{text[:start]}{self._edge}{taken_out}{self._edge}{text[start + len(core) :]}"

    def _restored(self, text: str) -> str:
        return self._taken_out_pattern.sub(lambda match: self._names[int(match[1])], text)

    def _check(self) -> None:
        """A chat without control tokens must read as it does without `split`, one with them must have no more."""
        ids = _reader(self._source)
        for text in ("Hello", " Hello \n", *self._names):
            messages = [{"role": "user", "content": text}]
            try:
                rendered = _render(self._source, messages)
                found = self.ids(rendered, messages, _any_length)
            except ChatRefusedError as error:
                raise ModelRefusedError(f"{error}; use allow") from error
            if text not in self._names and found != ids(rendered, _any_length, add_special_tokens=False):
                raise ModelRefusedError("special-tokens-in-text split: a chat reads otherwise with it; use allow")


def _any_length(num_tokens: int, is_least: bool) -> None:
    """For texts of our own."""


def _render(tokenizer: Any, messages: Messages) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template raises what it likes for a conversation that it does not know
        raise ChatRefusedError(f"the model's chat template refuses these messages: {error}") from error


def _splitting(tokenizer: Any) -> Any:
    """A copy that reads control tokens in texts as plain text."""
    split = copy.deepcopy(tokenizer)
    split.split_special_tokens = True
    return split


def _check_splits(tokenizer: Any) -> None:
    """Raises ModelRefusedError for a tokenizer whose model knows a control token's name as a piece of plain text."""
    control = special_token_ids(tokenizer) - {tokenizer.unk_token_id}
    for name in tokenizer.convert_ids_to_tokens(sorted(control)):
        for around in AROUND:
            found = tokenizer(around.format(name), add_special_tokens=False)["input_ids"]
            if read := control.intersection(found):
                raise ModelRefusedError(
                    f"special-tokens-in-text split: {name!r} must read as plain text, this tokenizer's vocabulary "
                    f"makes control token {min(read)} of it; use allow"
                )


def _reader(tokenizer: Any) -> Callable[..., list[int]]:
    """`tokenizer(text)["input_ids"]`. The backend itself is asked where that is the same: it lets other threads run,
    and tells how many tokens there are before a list of them is made."""

    def read_by_call(text: str, check: CheckLength, **options: bool) -> list[int]:
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        check(len(ids), False)
        return ids

    if not has_plain_backend(tokenizer):
        return read_by_call
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens

    def read(text: str, check: CheckLength, **options: bool) -> list[int]:
        (encoding,) = backend.encode_batch_fast([text], **options)
        check(len(encoding), False)
        ids: list[int] = encoding.ids
        return ids

    return read
