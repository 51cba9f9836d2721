"""Every field of a model's `generation_config.json` that shapes greedy answers: our tokens, all tasks and rows without
defaults mixed in one batch, against PEFT's `generate` of a batch of one on the same file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefix_store.peft_format import read_peft
from prefix_store.prefix import Prefix
from server.api.schemas import GenerateParameters
from server.engine.detokenizer import Detokenizer
from server.engine.generation_defaults import GenerationDefaults
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_runner import ModelRunner, load_model
from server.engine.sequence import PrefixRef, Sequence
from server.generation_config import defaults_of, read_generation_config
from tests.cases import WholeSteps, tiny_shape
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, VOCAB, letter_tokenizer, seq2seq_model

NEW_TOKENS = 16
ASCII = 0x20
TOKENIZER = letter_tokenizer(first=ASCII)  # stop strings are looked for with the letters a to f
PLAIN = GenerationDefaults()
Answers = dict[str, list[int]]


@dataclass(frozen=True)
class Asked:
    """A prompt, and the adapter behind which it is asked; none: the bare model."""

    name: str
    adapter: str | None
    prompt: list[int]


@dataclass(frozen=True)
class World:
    """A saved model, its adapters, what is asked, and what PEFT answers without a generation config."""

    family: str
    folder: Path
    prefixes: dict[str, Prefix]
    asked: list[Asked]
    plain: Answers

    @property
    def is_seq2seq(self) -> bool:
        return self.family in SEQ2SEQ_FAMILIES

    def folder_with(self, fields: dict[str, Any], folder: Path) -> Path:
        """The model, with these fields in its file."""
        made = folder / "with"
        shutil.copytree(self.folder / "model", made)
        own = json.loads((made / "generation_config.json").read_text())
        (made / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": None} | fields))
        return made

    def peft(self, folder: Path) -> Answers:
        """What PEFT's `generate` answers with the file in `folder`."""
        kind = AutoModelForSeq2SeqLM if self.is_seq2seq else AutoModelForCausalLM
        model: Any = kind.from_pretrained(folder, attn_implementation="eager").eval()
        behind = {name: PeftModel.from_pretrained(model, self.folder / name).eval() for name in self.prefixes}
        found = {}
        for each in self.asked:
            ids = torch.tensor([each.prompt])
            asked = model if each.adapter is None else behind[each.adapter]
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                answer = asked.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, tokenizer=TOKENIZER
                )
            found[each.name] = answer[0, 1 if self.is_seq2seq else len(each.prompt) :].tolist()
        return found

    def ours(self, folder: Path, *, kv: int = 4096, use: str = "auto", **parameters: Any) -> Answers:
        """All in one batch, beside the same without defaults, whose answers are checked here."""
        model = load_model(folder, torch.float32, torch.device("cpu"), reorders=False)
        shape = tiny_shape(model)
        runner = ModelRunner(model, shape, KVBlocks(shape, split_pool(kv, 1024)[0], torch.device("cpu")))
        defaults = defaults_of(read_generation_config(folder, use), TOKENIZER, use)  # type: ignore[arg-type]
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"] or []
        engine = WholeSteps(
            runner,
            lambda ref: self.prefixes[ref.digest],
            num_prefix_blocks=64,
            max_rows=24,
            max_step_tokens=24,
            eos_token_ids=frozenset(eos if isinstance(eos, list) else [eos]),
        )
        rows = {}
        for each in self.asked:
            refs = () if each.adapter is None else (PrefixRef(each.adapter, self.prefixes[each.adapter].layout),)
            for name, used, more in ((each.name, defaults, parameters), (f"plain {each.name}", PLAIN, {})):
                request = GenerateParameters.model_validate(more | ({} if used is defaults else {"ignore_eos": True}))
                params = request.sampling_params(NEW_TOKENS, used)
                start = runner.decoder_start_ids
                rows[name] = Sequence(name, each.prompt, params, Detokenizer(TOKENIZER), (refs,), start)
                engine.add(rows[name])
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
            engine.check_integrity()
        assert kv == 4096 or engine.scheduler.num_preemptions
        answers = {name: row.output_token_ids for name, row in rows.items()}
        assert {each.name: answers.pop(f"plain {each.name}") for each in self.asked} == self.plain
        return answers

    def tokens(self, index: int, num: int = 1) -> list[list[int]]:
        """`num` tokens from `index` on of every plain answer, each once."""
        return [list(ids) for ids in dict.fromkeys(tuple(self.plain[e.name][index : index + num]) for e in self.asked)]

    def before(self, asked: Asked) -> list[int]:
        """What the answer continues."""
        return [2 if self.family == "bart" else 0] if self.is_seq2seq else asked.prompt[-2:]

    def towards_prompts(self) -> list[list[Any]]:
        """A bias that makes answers repeat what was asked."""
        pairs = [[list(pair), 60.0] for each in self.asked for pair in pairwise(each.prompt)]
        return pairs + [[[each.prompt[0]], 15.0] for each in self.asked]

    def in_both(self) -> set[int]:
        """Tokens of plain answers behind the soft prompt and behind the prefix, before their last."""
        soft, kv = ([self.plain[e.name][:-1] for e in self.asked if e.adapter == name] for name in ("soft", "kv"))
        return set(chain(*soft)) & set(chain(*kv))

    def ids(self, index: int) -> list[int]:
        return [token_id for (token_id,) in self.tokens(index)]


def letters(token_ids: list[int]) -> str:
    return "".join(chr(ASCII + token_id) for token_id in token_ids)


REPEATING = [[[token_id], 9.0] for token_id in (7, 8, 9)]
# A file's fields, from what is answered without them. Answers end early where EOS is one of their tokens.
FIELDS: dict[str, Callable[[World], dict[str, Any]]] = {
    "eos_token_id": lambda w: {"eos_token_id": w.ids(4)},
    "repetition_penalty": lambda _: {"repetition_penalty": 1.3},
    "repetition_penalty below 1": lambda _: {"repetition_penalty": 0.8},
    "encoder_repetition_penalty": lambda _: {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 2, "sequence_bias": REPEATING},
    "no_repeat_ngram_size of one": lambda _: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda w: {"encoder_no_repeat_ngram_size": 1, "sequence_bias": w.towards_prompts()},
    "encoder_no_repeat_ngram_size of two": lambda w: {
        "encoder_no_repeat_ngram_size": 2,
        "sequence_bias": w.towards_prompts(),
    },
    "bad_words_ids": lambda w: {
        "bad_words_ids": [*w.tokens(0), *w.tokens(2, 2), *w.tokens(5, 3), [w.asked[0].prompt[-1], 9]],
    },
    "bad_words_ids with EOS": lambda w: {
        "bad_words_ids": [*w.tokens(3), *w.tokens(4), *w.tokens(1, 2), *w.tokens(0, 2)],
        "eos_token_id": w.ids(4),
    },
    "sequence_bias": lambda w: {
        "sequence_bias": [[ids, -9.5] for ids in w.tokens(1)] + [[ids, -30.0] for ids in w.tokens(4, 2)] + [[[7], 2.5]],
    },
    "sequence_bias of two that end alike": lambda w: {
        "sequence_bias": [[ids, -2.0] for ids in w.tokens(3, 2)] + [[ids, -3.0] for ids in w.tokens(2, 3)],
    },
    "min_length": lambda w: {"min_length": 12, "eos_token_id": w.ids(4)},
    "min_new_tokens": lambda w: {"min_new_tokens": 9, "eos_token_id": w.ids(4)},
    "min_new_tokens over min_length": lambda w: {
        "min_new_tokens": 6,
        "min_length": 40,
        "eos_token_id": [*w.ids(4), *w.ids(9)],
    },
    "forced_bos_token_id": lambda _: {"forced_bos_token_id": 17},
    "forced_bos_token_id and begin_suppress_tokens": lambda w: {
        "forced_bos_token_id": 17,
        "begin_suppress_tokens": [*w.ids(0), *w.ids(1)],
    },
    "forced_eos_token_id": lambda _: {"forced_eos_token_id": 5},
    "forced_eos_token_id of several": lambda _: {"forced_eos_token_id": [9, 6, 30]},
    "exponential_decay_length_penalty": lambda _: {
        "exponential_decay_length_penalty": [3, 1.4],
        "eos_token_id": [40, 41],
    },
    "exponential_decay_length_penalty and min_length": lambda _: {
        "exponential_decay_length_penalty": [1, 3.0],
        "min_new_tokens": 8,
        "eos_token_id": [40, 41],
    },
    "suppress_tokens": lambda w: {"suppress_tokens": [*w.ids(0), *w.ids(3)]},
    "suppress_tokens outside the vocabulary": lambda w: {"suppress_tokens": [-1, VOCAB, 10**9, *w.ids(2)]},
    "begin_suppress_tokens": lambda w: {"begin_suppress_tokens": [*w.ids(0), *w.ids(1)]},
    "stop_strings": lambda w: {"stop_strings": [letters(ids) for ids in w.tokens(3, 2)]},
    "stop_strings, one": lambda w: {"stop_strings": letters(sorted(w.in_both())[:1])},
    "stop_strings that begin in the text before": lambda w: {
        "stop_strings": [letters([*w.before(each), *w.plain[each.name][:2]]) for each in w.asked]
    },
    "repetition_penalty of normalised logits": lambda _: {"repetition_penalty": 1.2, "renormalize_logits": True},
    "all together": lambda w: {
        "repetition_penalty": 1.1,
        "encoder_repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": [*w.tokens(2), *w.tokens(5, 2)],
        "sequence_bias": [[ids, 1.5] for ids in w.tokens(7)],
        "min_length": 9,
        "forced_bos_token_id": 17,
        "forced_eos_token_id": 5,
        "exponential_decay_length_penalty": [9, 1.05],
        "suppress_tokens": [token_id for token_id in w.ids(8) if token_id not in (5, 17)],
        "begin_suppress_tokens": w.ids(1),
        "eos_token_id": [*w.ids(4), *w.ids(9)],
    },
}


def save_adapter(family: str, folder: Path, name: str, config: Any) -> Prefix:
    kind = AutoModelForSeq2SeqLM if family in SEQ2SEQ_FAMILIES else AutoModelForCausalLM
    model: Any = kind.from_pretrained(folder / "model")
    shape = tiny_shape(model)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder / name)
    files = [(folder / name / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")]
    return read_peft(files[0], files[1], shape)


@pytest.fixture(scope="module", params=["llama", "bart", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(11)
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    if family in SEQ2SEQ_FAMILIES:
        model, task = seq2seq_model(SEQ2SEQ_FAMILIES[family]()), TaskType.SEQ_2_SEQ_LM
        sizes = {"token_dim": tiny_shape(model).num_kv_heads * tiny_shape(model).head_dim}
    else:
        model, task, sizes = AutoModelForCausalLM.from_config(FAMILIES[family]()).float(), TaskType.CAUSAL_LM, {}
    model.save_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefixes = {
            "soft": save_adapter(family, folder, "soft", PromptTuningConfig(task_type=task, num_virtual_tokens=5)),
            "kv": save_adapter(family, folder, "kv", PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **sizes)),
        }
    asked = [
        Asked(f"{adapter} {n}", adapter, torch.randint(3, VOCAB, (n,)).tolist())
        for adapter in ("soft", "kv", None)
        for n in (1, 9)
    ]
    found = World(family, folder, prefixes, asked, {})
    return World(family, folder, prefixes, asked, found.peft(found.folder_with({}, folder)))


@pytest.mark.parametrize("field", list(FIELDS))
def test_tokens_equal_peft_with_the_same_file(world: World, field: str, tmp_path: Path) -> None:
    """And without the field PEFT answers otherwise, behind a soft prompt as behind a KV prefix."""
    fields = FIELDS[field](world)
    folder = world.folder_with(fields, tmp_path)
    expected = world.peft(folder)
    name = field.partition(" ")[0].strip(",")
    without = {other: value for other, value in fields.items() if other != name and name != "all"}
    before = world.peft(world.folder_with(without, tmp_path / "before")) if without else world.plain
    changed = {case.split()[0] for case in expected if expected[case] != before[case]}
    ours = world.ours(folder)
    unread = world.ours(folder, use="none")
    num_wrong = [sum(answers[case] != expected[case] for case in expected) for answers in (unread, ours)]
    print(f"| {world.family} | {field} | {num_wrong[0]} of {len(expected)} | {num_wrong[1]} of {len(expected)} |")
    assert ours == expected
    assert changed >= ({"kv"} if world.is_seq2seq and field.startswith("encoder_") else {"kv", "soft"}), changed
