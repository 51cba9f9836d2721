"""The model's generation config over HTTP: defaults of requests, what overrides them, what is refused or told of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.errors import ModelFilesError
from server.generation_config import GenerationFields, read_generation_config
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for

PROMPT, EOS = "A fine film.\nSentiment:", 257
FILE = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [65, 66],
    "min_new_tokens": 3,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "do_sample": True,
    "eos_token_id": EOS,
}
Model = Callable[[dict[str, Any] | str], Path]


@pytest.fixture(scope="module")
def model_with(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model with another `generation_config.json`."""

    def make(fields: dict[str, Any] | str) -> Path:
        folder = tmp_path_factory.mktemp("model") / NAME
        shutil.copytree(model_path, folder)
        (folder / "generation_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return folder

    return make


def serving(folder: Path, data: Path, **settings: object) -> Iterator[Served]:
    yield from serve_in_thread(make_state(settings_for(data, **settings), ModelFiles(folder, NAME)))


@pytest.fixture(scope="module")
def served(model_with: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(model_with(FILE), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bare(model_with: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same file, not used."""
    yield from serving(model_with(FILE), tmp_path_factory.mktemp("bare"), generation_config="none")


@pytest.fixture(scope="module")
def stopping(model_with: Model, bare: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    fields = {"stop_strings": [stop_of(tokens_text(bare, 12)), PROMPT[-1] + "never"], "eos_token_id": EOS}
    yield from serving(model_with(fields), tmp_path_factory.mktemp("stopping"))


def stop_of(text: str) -> str:
    """The first two letters side by side that are whole."""
    return next(text[i : i + 2] for i in range(1, len(text)) if "\ufffd" not in text[i : i + 2])


def tokens_text(served: Served, num: int, **parameters: object) -> str:
    return str(served.generate(PROMPT, max_new_tokens=num, **parameters).json()["generated_text"])


def details(served: Served, **parameters: object) -> dict[str, Any]:
    answer = served.generate(PROMPT, details=True, **{"max_new_tokens": 24, **parameters})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["details"])


def ids(served: Served, **parameters: object) -> list[int]:
    return [token["id"] for token in details(served, **parameters)["tokens"]]


def ask_transformers(folder: Path, **more: object) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]])
    with torch.inference_mode():
        options = {"max_new_tokens": 24, "do_sample": False} | more
        found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return list(found[0, prompt.shape[1] :].tolist())


def test_requests_have_the_files_defaults(served: Served, bare: Served, model_with: Model) -> None:
    assert ids(served) == ask_transformers(model_with(FILE))
    assert ids(served) != ids(bare)
    assert ids(bare) == ask_transformers(model_with({"eos_token_id": EOS}))


def test_a_request_overrides_the_files_penalty(served: Served, model_with: Model) -> None:
    assert ids(served, repetition_penalty=1.0) == ask_transformers(model_with(FILE), repetition_penalty=1.0)
    assert ids(served, repetition_penalty=1.0) != ids(served)


def test_openai_routes_have_the_same_defaults(served: Served, bare: Served) -> None:
    def text(server: Served, **fields: object) -> str:
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **fields}
        return str(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])

    assert text(served) == tokens_text(served, 24) != text(bare)
    assert text(served, repetition_penalty=1.0) == tokens_text(served, 24, repetition_penalty=1.0)


def test_generate_stays_greedy_where_the_file_samples(served: Served) -> None:
    assert details(served)["seed"] is None
    assert len({tokens_text(served, 12) for _ in range(4)}) == 1


def test_sampled_answers_take_the_files_values_unless_given(served: Served, bare: Served) -> None:
    """The bare server, given the file's values, answers the same."""
    sampling = {name: FILE[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    shaping: dict[str, Any] = {"do_sample": True, "seed": 5, "repetition_penalty": 1.0}
    for changed in ({}, {"temperature": 3.0}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}):
        given = shaping | sampling | changed
        assert ids(served, **shaping, **changed) == ids(served, **given)
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "seed": 5, "repetition_penalty": 1.0}
    texts = [
        served.http.post("/v1/completions", json=body | more).json()["choices"][0]["text"]
        for more in ({}, sampling, {"temperature": 2.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_task_and_an_ensemble_have_the_defaults_too(served: Served, bare: Served) -> None:
    for server in (served, bare):
        for seed, task in ((1, "one"), (2, "two")):
            assert server.put(task, native(seed)).status_code == 201
        for rule in ("mean_probs", "vote"):
            body = {"kind": "ensemble", "members": ["one", "two"], "rule": rule}
            assert server.http.put(f"/v1/prefixes/{rule.replace('_', '-')}", json=body).status_code == 201
    for task in ("one", "mean-probs", "vote"):
        answers = [
            server.generate(PROMPT, task, max_new_tokens=24, details=True).json()["details"]["tokens"]
            for server in (served, bare)
        ]
        tokens, others = ([token["id"] for token in answer] for answer in answers)
        assert tokens != others
        assert not {65, 66} & set(tokens)
        trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        assert len(set(trigrams)) == len(trigrams)


def test_info_names_what_is_in_force(served: Served, bare: Served) -> None:
    expected = {name: value for name, value in FILE.items() if name not in ("do_sample", "eos_token_id")}
    assert served.http.get("/info").json()["generation_config"] == expected
    assert bare.http.get("/info").json()["generation_config"] == {}


def test_eos_is_suppressed_until_min_new_tokens(model_with: Model, bare: Served, tmp_path: Path) -> None:
    eos = sorted({ids(bare)[2], ids(bare)[5]})
    folder = model_with({"eos_token_id": eos})
    for server in serving(folder, tmp_path):
        assert len(ids(server)) < 6
        for least in (0, 5, 24):
            found = ids(server, min_new_tokens=least)
            assert found == ask_transformers(folder, min_new_tokens=least)
            assert len(found) >= least
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "min_tokens": 24}
        usage = server.http.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == 24
        assert ids(server, min_new_tokens=24, ignore_eos=True) == ids(bare, ignore_eos=True)


@pytest.mark.parametrize(("given", "least", "most"), [({"max_new_tokens": 4}, 5, 4), ({}, 129, 128)])
def test_more_tokens_at_least_than_at_most_are_refused(
    served: Served, given: dict[str, int], least: int, most: int
) -> None:
    refused = served.generate(PROMPT, min_new_tokens=least, **given)
    assert refused.status_code == 422
    assert refused.json()["error"] == f"min_new_tokens must be <= max_new_tokens ({most}), got {least}"
    body = {"model": NAME, "prompt": PROMPT, "min_tokens": least, "max_tokens": most}
    refused = served.http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "min_tokens"
    assert served.generate(PROMPT, min_new_tokens=4, max_new_tokens=4).status_code == 200


def test_the_files_stop_strings_end_an_answer(stopping: Served, bare: Served) -> None:
    text = tokens_text(bare, 12)
    at = text.index(stop_of(text))
    assert tokens_text(stopping, 12) == text[: at + 2]
    assert details(stopping, max_new_tokens=12)["finish_reason"] == "stop_sequence"
    assert tokens_text(stopping, 12, stop=[]) == text
    assert tokens_text(stopping, 12, stop=[text[8]]) == tokens_text(bare, 12, stop=[text[8]])
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    choice = stopping.http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")


WRONG: list[dict[str, Any] | str] = [
    "{",
    "[1, 2]",
    "\xff",
    {"repetition_penalty": -1.0},
    {"repetition_penalty": "1.05"},
    {"repetition_penalty": True},
    {"repetition_penalty": float("nan")},
    {"no_repeat_ngram_size": -2},
    {"no_repeat_ngram_size": 2.5},
    {"bad_words_ids": [[258]]},
    {"bad_words_ids": [[]]},
    {"bad_words_ids": [5]},
    {"bad_words_ids": [[-1]]},
    {"bad_words_ids": "five"},
    {"sequence_bias": [[[5], float("inf")]]},
    {"sequence_bias": [[[900], 1.0]]},
    {"sequence_bias": {"5": 1.0}},
    {"min_length": "long"},
    {"min_new_tokens": -1},
    {"suppress_tokens": 5},
    {"suppress_tokens": ["a"]},
    {"begin_suppress_tokens": [1.5]},
    {"forced_bos_token_id": 258},
    {"forced_bos_token_id": [1]},
    {"forced_eos_token_id": -1},
    {"forced_eos_token_id": []},
    {"forced_eos_token_id": 5, "suppress_tokens": [5]},
    {"exponential_decay_length_penalty": [1]},
    {"exponential_decay_length_penalty": [1, -2.0]},
    {"encoder_repetition_penalty": 0},
    {"stop_strings": [""]},
    {"stop_strings": 5},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 1.5},
    {"top_k": 1.5},
    {"min_p": 2},
    {"eos_token_id": "2"},
    {"eos_token_id": [[2]]},
    {"max_new_tokens": "many"},
    {"num_return_sequences": 3},
    {"early_stopping": "perhaps"},
]
NOT_SERVED = "generation_config_not_served"  # libraries have things of their own to say
NOT_NAMED = [{"suppress_tokens": 5}, {"max_new_tokens": "many"}]  # by transformers, which reads them first


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: json.dumps(fields)[:60])
def test_values_that_cannot_hold_are_refused_in_one_line(fields: dict[str, Any] | str, model_with: Model) -> None:
    with pytest.raises(ModelFilesError, match=r"^generation_config\.json") as refused:
        read_generation_config(model_with(fields), "auto")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    if isinstance(fields, dict) and fields not in NOT_NAMED:
        assert next(iter(fields)) in str(refused.value)


def test_a_file_that_is_left_out_need_not_hold(model_with: Model) -> None:
    """But EOS must: it is used."""
    assert read_generation_config(model_with({"repetition_penalty": -1.0, "bad_words_ids": [[900]]}), "none") == (
        GenerationFields()
    )
    with pytest.raises(ModelFilesError, match="eos_token_id"):
        read_generation_config(model_with({"eos_token_id": "2"}), "none")


UNSERVED: dict[str, Any] = {
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.5},
    "token_healing": True,
    "remove_invalid_values": True,
    "max_time": 3.0,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "suppress_tokens": [5, 900],
    "temperature": 0.0,
    "eos_token_id": [],
    "diversity_penalty": 0.5,
}


@pytest.mark.parametrize("name", list(UNSERVED))
def test_a_field_that_is_not_served_is_named_at_start(name: str, model_with: Model) -> None:
    with capture_logs() as logs:
        fields = read_generation_config(model_with({"eos_token_id": EOS, name: UNSERVED[name]}), "auto")
        read_generation_config(model_with({"eos_token_id": EOS, name: UNSERVED[name]}), "none")
    assert [(entry["log_level"], entry["fields"]) for entry in logs if entry["event"] == NOT_SERVED] == [
        ("warning", [name])
    ]
    assert fields.suppress_tokens in ((), (5,))
    assert fields.temperature == 1.0


def test_fields_of_beams_are_named_with_beams_only(model_with: Model) -> None:
    ofbart = {"length_penalty": 2.0, "early_stopping": True}
    with capture_logs() as logs:
        read_generation_config(model_with(ofbart), "auto")
        read_generation_config(model_with(ofbart | {"num_beams": 4}), "auto")
    (told,) = [entry for entry in logs if entry["event"] == NOT_SERVED]
    assert told["fields"] == ["num_beams", "length_penalty", "early_stopping"]


def test_nothing_is_told_of_a_file_that_is_served_whole(model_with: Model) -> None:
    more = {"max_length": 20, "prompt_lookup_num_tokens": 3, "renormalize_logits": True, "use_cache": True}
    with capture_logs() as logs:
        read_generation_config(model_with(FILE | more), "auto")
    assert not [entry for entry in logs if entry["event"] == NOT_SERVED]


def test_values_of_a_config_without_the_file_hold(model_with: Model) -> None:
    """As transformers reads models of its earlier versions."""
    folder = model_with({})
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}))
    fields = read_generation_config(folder, "auto")
    assert (fields.repetition_penalty, fields.no_repeat_ngram_size) == (1.3, 2)
    (folder / "config.json").write_text(json.dumps(config | {"repetition_penalty": -1.3}))
    with pytest.raises(ModelFilesError, match=r"^config\.json: repetition_penalty"):
        read_generation_config(folder, "auto")
