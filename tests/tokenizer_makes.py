"""Tokenizers of every make that models come with, small and built in place; a model that answers with given tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, CTRLTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁the",
    "▁The",
    "▁cat",
    "▁你",
    "▁é",
    "▁,",
    "▁.",
    "the",
    "cat",
    "ing",
    "ab",
    "é",
    "你",
    "नम",
    "🎬",
    ",",
]
LETTERS = [*"abcdefghinortu.\n"]
CHARACTERS = ["é", "你", "न", "🎬", "\ufffd"]  # of two, three and four bytes; the last one is a true U+FFFD


def fast(backend: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **more)


def byte_level(*, add_prefix_space: bool) -> PreTrainedTokenizerFast:
    """As GPT-2's: tokens of bytes that cut characters anywhere, and cross from one into the next."""
    letters = bytes_to_unicode()
    pieces = [" the", " cat", "the", " ", "  ", "ing", "é", " 你", "\ufffd"]
    encoded = [piece.encode() for piece in pieces]
    for character in CHARACTERS:
        raw = character.encode()
        encoded += [raw[:2], b" " + raw[:1], raw[1:], raw[-1:] + b" a", raw[-1:] + "你".encode()[:1]]
    tokens = [*letters.values(), *("".join(letters[byte] for byte in each) for each in encoded)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *tokens]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """`prepend`: Llama 2's file; `first`, `always`, `never`: Metaspace; `mistral`: Metaspace with Llama's decoder."""
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *WORDS, *LETTERS]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [decoders.Strip(content=" ", left=1)]
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*joined, *strip])
    elif kind == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([*joined, *strip])
    elif kind == "unprepended":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(joined)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
        backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    return fast(backend)


def unigram(*, cleans_up: bool = False) -> PreTrainedTokenizerFast:
    """As T5's and XLNet's. Many saved ones have spaces before punctuation taken out of decoded text."""
    contractions = ["▁n", "'t", "▁n't", "▁'", "'", "▁'v", "re", "▁?", "s"] if cleans_up else []
    pieces = dict.fromkeys([*SPECIAL, *WORDS, *LETTERS, *contractions])
    backend = Tokenizer(models.Unigram([(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return fast(backend, clean_up_tokenization_spaces=cleans_up)


def word_piece(*, cleanup: bool) -> PreTrainedTokenizerFast:
    words = ["the", "cat", "##ing", "##s", "你", "##你", ",", ".", "'", "n't", "'m", "a", "b", "c", "##a", "##b"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    return fast(backend)


def ctrl() -> CTRLTokenizer:
    """Written in Python, words joined with "@@ ", no EOS. BlenderbotSmall's and BertTweet's are alike."""
    words = ["the", "cat", "ca@@", "a@@", "b", "t", "ing", "i@@", "n@@", "g", ",", ".", "é", "你", "hel@@", "lo"]
    with TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(["<unk>", *words])}))
        merges.write_text("#version: 0.2\nt h\nth e</w>\nc a\nca t</w>\n")
        return CTRLTokenizer(str(vocab), str(merges))


MAKES: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level-prefix-space": lambda: byte_level(add_prefix_space=True),
    **{
        f"sentencepiece-{kind}": lambda kind=kind: sentencepiece(kind)
        for kind in ("prepend", "unprepended", "mistral", "first", "always", "never")
    },
    "unigram": unigram,
    "unigram-cleaned-up": lambda: unigram(cleans_up=True),
    "word-piece": lambda: word_piece(cleanup=False),
    "word-piece-cleanup": lambda: word_piece(cleanup=True),
    "byt5": ByT5Tokenizer,
    "ctrl": ctrl,
}


def save_scripted_model(path: Path, tokenizer: Any, script: list[int]) -> Path:
    """A tiny Llama whose most probable token after one of `script` is the next of it, after any other token the first.
    The script has no token twice."""
    assert len(set(script)) == len(script)
    tokenizer.save_pretrained(path)
    size = (len(tokenizer) // 16 + 1) * 16  # some ids stand for no token
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    followed = torch.full((size,), script[0])
    followed[script[:-1]] = torch.tensor(script[1:])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.eye(size)[followed].T)
    model.save_pretrained(path)
    return path
