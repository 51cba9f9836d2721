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
from tests import naive
from tests.cases import WholeSteps, tiny_shape
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, VOCAB, letter_tokenizer, seq2seq_model

NEW_TOKENS = 18
ASCII = 0x20
TOKENIZER = letter_tokenizer(first=ASCII)  # stop strings are looked for with the letters a to f
PLAIN, IGNORING_EOS = GenerationDefaults(), {"ignore_eos": True}
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
        runner, defaults = self.runner(folder, kv), self.defaults(folder, use)
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"] or []
        rows = {}
        for each in self.asked:
            refs = () if each.adapter is None else (PrefixRef(each.adapter, self.prefixes[each.adapter].layout),)
            for name, used, more in ((each.name, defaults, parameters), (f"plain {each.name}", PLAIN, IGNORING_EOS)):
                params = GenerateParameters.model_validate(more).sampling_params(NEW_TOKENS, used)
                start = runner.decoder_start_ids
                rows[name] = Sequence(name, each.prompt, params, Detokenizer(TOKENIZER), (refs,), start)
        num_preemptions = self.run(runner, list(rows.values()), frozenset(eos))
        assert kv == 4096 or num_preemptions
        answers = {name: row.output_token_ids for name, row in rows.items()}
        assert {each.name: answers.pop(f"plain {each.name}") for each in self.asked} == self.plain
        return answers

    def runner(self, folder: Path, kv: int = 4096) -> ModelRunner:
        model = load_model(folder, torch.float32, torch.device("cpu"), reorders=False)
        shape = tiny_shape(model)
        return ModelRunner(model, shape, KVBlocks(shape, split_pool(kv, 1024)[0], torch.device("cpu")))

    def defaults(self, folder: Path, use: str) -> GenerationDefaults:
        return defaults_of(read_generation_config(folder, use), TOKENIZER, use)  # type: ignore[arg-type]

    def run(self, runner: ModelRunner, sequences: list[Sequence], eos: frozenset[int]) -> int:
        """To the end, in one engine; how many were preempted."""
        engine = WholeSteps(
            runner,
            lambda ref: self.prefixes[ref.digest],
            num_prefix_blocks=64,
            max_rows=24,
            max_step_tokens=24,
            eos_token_ids=eos,
        )
        for sequence in sequences:
            engine.add(sequence)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
            engine.check_integrity()
        return engine.scheduler.num_preemptions

    def tokens(self, index: int, num: int = 1) -> list[list[int]]:
        """`num` tokens from `index` on of every plain answer, each once."""
        return [list(ids) for ids in dict.fromkeys(tuple(self.plain[e.name][index : index + num]) for e in self.asked)]

    def before(self, asked: Asked) -> list[int]:
        """What the answer continues."""
        return [2 if self.family == "bart" else 0] if self.is_seq2seq else asked.prompt[-2:]

    def towards_prompts(self) -> list[list[Any]]:
        """A bias that makes answers repeat what was asked behind adapters whose encoder text is known."""
        adapters = ("kv",) if self.is_seq2seq else ("kv", "soft")
        prompts = [each.prompt for each in self.asked if each.adapter in adapters and len(each.prompt) > 1]
        pairs = [[list(pair), 900.0] for prompt in prompts for pair in pairwise(prompt)]
        return pairs + [[prompt[:1], 300.0] for prompt in prompts]

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


@pytest.mark.parametrize("field", ["repetition_penalty", "no_repeat_ngram_size", "sequence_bias"])
def test_tokens_equal_peft_after_preemption(world: World, field: str, tmp_path: Path) -> None:
    folder = world.folder_with(FIELDS[field](world), tmp_path)
    assert world.ours(folder, kv=5 * 16 if world.is_seq2seq else 7 * 16) == world.peft(folder)


def test_a_requests_own_value_wins(world: World, tmp_path: Path) -> None:
    fields = {"repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": world.ids(4)}
    folder = world.folder_with(fields, tmp_path)
    assert world.ours(folder, repetition_penalty=1.0, min_new_tokens=0) == world.peft(
        world.folder_with({"eos_token_id": world.ids(4)}, tmp_path / "without")
    )


def test_a_request_that_ignores_eos_is_as_a_file_without_eos(world: World, tmp_path: Path) -> None:
    """So nothing suppresses EOS, and a bad word that is EOS is one."""
    fields = {"min_new_tokens": 9, "bad_words_ids": [*world.tokens(4), *world.tokens(2)]}
    folder = world.folder_with(fields | {"eos_token_id": world.ids(4)}, tmp_path)
    expected = world.peft(world.folder_with(fields, tmp_path / "without"))
    assert world.ours(folder, ignore_eos=True) == expected


@pytest.mark.parametrize("use", ["auto", "none"])
def test_an_answer_of_an_encoder_decoder_begins_with_its_forced_token(world: World, use: str, tmp_path: Path) -> None:
    folder = world.folder_with({"forced_bos_token_id": 17}, tmp_path)
    answers = world.ours(folder, use=use)
    begun = {answer[0] == 17 for name, answer in answers.items() if world.is_seq2seq or (name[-2:] == " 1")}
    assert begun == {world.is_seq2seq or use == "auto"}


def test_members_that_choose_together_are_shaped_as_one(tmp_path: Path, world: World) -> None:
    """The rules see the log of the mean of their distributions: transformers' own processors on the naive loop's."""
    if world.is_seq2seq:
        pytest.skip("the naive loop of both kinds is one")
    fields = FIELDS["all together"](world) | {"eos_token_id": world.ids(4)}
    folder = world.folder_with(fields, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=naive.NAME).eval()
    prompt, members = world.asked[1].prompt, [[world.prefixes["kv"]], [world.prefixes["soft"]]]
    config, _ = model._prepare_generation_config(None, max_new_tokens=NEW_TOKENS)
    model._prepare_special_tokens(config)
    config.max_length = len(prompt) + NEW_TOKENS
    ids = torch.tensor([prompt])
    processors = model._get_logits_processor(config, len(prompt), ids, device="cpu")
    text: list[int] = []
    while len(text) < NEW_TOKENS and not set(text[-1:]) & set(fields["eos_token_id"]):
        logits = [naive.next_logits(model, prompt, text, prefixes) for prefixes in members]
        mean = torch.stack([each.softmax(-1) for each in logits]).mean(0).log()
        text.append(int(processors(torch.tensor([prompt + text]), mean[None]).argmax()))
    runner, defaults = world.runner(folder), world.defaults(folder, "auto")
    refs = tuple((PrefixRef(name, world.prefixes[name].layout),) for name in ("kv", "soft"))
    params = GenerateParameters().sampling_params(NEW_TOKENS, defaults)
    sequence = Sequence("e", prompt, params, Detokenizer(TOKENIZER), refs)
    world.run(runner, [sequence], frozenset(fields["eos_token_id"]))
    assert sequence.output_token_ids == text
