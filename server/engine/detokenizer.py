"""Token ids to text, a piece at a time, never splitting a character; and the watch for stop strings."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """One row's text so far. `text` holds what was emitted; held back are unfinished characters and what may yet
    become a stop string that the caller does not want to see."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), include_stop: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._include_stop = include_stop
        self._token_ids: list[int] = []
        self._decoded = ""  # all that the stream gave
        self._num_decoded = 0  # tokens whose text is in `_decoded`
        self._first_token = 0  # of those that are decoded as one; they begin in `_decoded` at `_first_char`
        self._first_char = 0
        self.text = ""
        self.is_stopped = False

    def append(self, token_id: int) -> str:
        """The text that became certain with this token. Sets `is_stopped` at a stop string."""
        self._token_ids.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            self._begin_anew()
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._tokenizer.backend_tokenizer, self._token_ids[self._first_token :])
        if not piece:
            return ""
        self._num_decoded = len(self._token_ids)
        return self._emit(piece)

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        if self.is_stopped:
            return ""
        whole = self._decode()
        if not whole.startswith(self._decoded[self._first_char :]):
            self._begin_anew()
            whole = self._decode()
        piece = self._emit(whole[len(self._decoded) - self._first_char :])
        if self.is_stopped:
            return piece
        rest = self._decoded[len(self.text) :]
        self.text += rest
        return piece + rest

    def _begin_anew(self) -> None:
        """Decode what is not yet decoded by itself: a byte that fits no character makes invalid all the bytes
        before it, and their text may be out already."""
        self._first_token, self._first_char = self._num_decoded, len(self._decoded)

    def _decode(self) -> str:
        ids = self._token_ids[self._first_token :]
        whole: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return whole

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
