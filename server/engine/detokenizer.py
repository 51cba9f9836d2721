"""Token ids to text, a piece at a time, never splitting a character; and the watch for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.token_texts import REPLACEMENT, TokenTexts

MAX_WINDOW = 4  # tokens that are decoded again with each new one, while characters are complete
NUM_CONTEXT_TOKENS = 4  # of the text before the answer, at least


@dataclass(frozen=True)
class Place:
    """Where a token stands in an answer: its text begins at character `offset`, behind that of the tokens `behind`."""

    offset: int
    behind: tuple[int, ...]


class Detokenizer:
    """One row's text so far. `text` holds what was emitted; held back are unfinished characters and what may yet
    become a stop string that the caller does not want to see.

    `context_ids` are the tokens that the row continues. New tokens are decoded behind the last of them, because many
    tokenizers drop the space before the first word that they decode. Later tokens are decoded behind a window of
    earlier ones, as in TGI and vLLM.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        include_stop: bool = True,
        context_ids: Sequence[int] = (),
    ) -> None:
        self._texts = TokenTexts(tokenizer)
        self._decode = self._texts.decode_certain
        self._stop = stop
        self._include_stop = include_stop
        self._window = self._last_of(context_ids)
        self._num_read = len(self._window)  # tokens of the window whose text is in `_read_text`
        self._read_text = self._texts.decode(self._window)
        self._piece_start, self._piece_end = 0, self._num_read  # in the window, the tokens of the last piece of text
        self._decoded = ""  # all text of the row but for unfinished characters
        self._held_bytes: list[bytes] = []  # of the tokens behind `_num_read` whose place was asked for
        self.text = ""
        self.is_stopped = False

    def append(self, token_id: int) -> str:
        """The text that became certain with this token. Sets `is_stopped` at a stop string."""
        window = self._window
        window.append(token_id)
        whole = self._decode(window)
        if whole.endswith(REPLACEMENT) and len(whole) > len(self._read_text):
            return ""  # a character that the next token may complete
        piece = self._take(whole)
        if self._stop:
            return self._emit(piece)
        self._decoded += piece
        self.text = self._decoded
        return piece

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        if self.is_stopped:
            return ""
        piece = self._emit(self._take(self._texts.decode(self._window)))
        if self.is_stopped:
            return piece
        rest = self._decoded[len(self.text) :]
        self.text += rest
        return piece + rest

    def place(self, token_id: int) -> Place:
        """Where `token_id` would stand as the next token."""
        behind = tuple(self._window[self._piece_start : self._num_read])
        held_back = self._window[self._num_read :]
        self._held_bytes = self._held_bytes[: len(held_back)]
        for held_id in held_back[len(self._held_bytes) :]:
            self._held_bytes.append(self._texts.read(held_id, behind).encoded)
        offset = len(self._decoded)
        if held_back:
            first_byte = self._texts.read(token_id, behind).encoded[:1]
            read = b"".join([*self._held_bytes, first_byte]).decode("utf-8", "replace")
            offset += max(0, len(read) - 1)  # of the character that the byte begins or goes on with
        return Place(offset, behind)

    def _last_of(self, context_ids: Sequence[int]) -> list[int]:
        """As few of the last tokens as read like text that begins with a whole character."""
        count = NUM_CONTEXT_TOKENS
        while True:
            last = list(context_ids[-count:])
            text = self._texts.decode(last)
            if count >= len(context_ids) or (text and not text.startswith(REPLACEMENT)):
                return last
            count *= 2

    def _take(self, whole: str) -> str:
        """Move the window's end behind `whole`, the text of all its tokens. Returns the text that is new."""
        if whole.startswith(self._read_text):
            piece = whole[len(self._read_text) :]
        elif self._read_text.startswith(whole):
            return ""  # the context's end is not certain yet
        elif not self._decoded and whole.startswith(begun := self._read_text.rstrip(REPLACEMENT)):
            piece = whole[len(begun) :]  # the context ended within a character, which is whole now
        else:
            # A byte that fits no character makes invalid all the bytes before it, and their text may be out already.
            del self._window[: self._num_read]
            self._piece_start = self._piece_end = 0
            piece = whole = self._decode(self._window)
        self._num_read, self._read_text = len(self._window), whole
        if piece:
            self._piece_start, self._piece_end = self._piece_end, self._num_read
            if self._num_read > MAX_WINDOW:
                self._cut_window()
        return piece

    def _cut_window(self) -> None:
        """To the tokens of the last piece: these begin with a character. Not while a part of its text is uncertain."""
        if self._decode is not self._texts.decode and self._read_text != self._texts.decode(self._window):
            return
        del self._window[: self._piece_start]
        self._num_read = self._piece_end = len(self._window)
        self._piece_start = 0
        self._read_text = self._decode(self._window)

    def _emit(self, piece: str) -> str:
        searched = len(self._decoded)
        self._decoded += piece
        end = len(self._decoded)
        if self._stop:
            longest = max(map(len, self._stop))
            found = [
                (at, stop)
                for stop in self._stop
                if (at := self._decoded.find(stop, max(0, searched - longest + 1))) >= 0
            ]
            if found:
                at, stop = min(found)
                self.is_stopped = True
                end = at + len(stop) if self._include_stop else at
            elif not self._include_stop:
                end -= self._num_held_back(longest)
        emitted = self._decoded[len(self.text) : end]
        self.text += emitted
        return emitted

    def _num_held_back(self, longest: int) -> int:
        for count in range(min(longest - 1, len(self._decoded)), 0, -1):
            tail = self._decoded[-count:]
            if any(stop.startswith(tail) for stop in self._stop):
                return count
        return 0
