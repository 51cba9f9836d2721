"""T5 and BART over HTTP: 16 tasks mixed, arriving one after another, against PEFT's batch of one and the naive loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM, PegasusConfig

from prefix_store.native_format import write_native
from prefix_store.prefix import Layers, ModelShape, Prefix
from server.model_files import ModelFiles
from server.start import make_state
from tests import naive
from tests.cases import NEW_TOKENS, TIE, generated
from tests.conftest import Served, serve_in_thread, settings_for
from tests.tiny_models import BART, HIDDEN, SEQ2SEQ_FAMILIES, VOCAB, letter_tokenizer, seq2seq_model

NATIVE = {"Content-Type": "application/octet-stream"}
NUM_TASKS = 16
SEQ2SEQ: dict[str, Any] = {"task_type": TaskType.SEQ_2_SEQ_LM}


@dataclass
class Expected:
    task: str
    text: str
    tokens: list[int]
    logits: torch.Tensor


def letters(token_ids: list[int]) -> str:
    return "".join(chr(0x100 + i) for i in token_ids)


def kv(shape: ModelShape, generator: torch.Generator, n: int, layers: tuple[int, ...] = ()) -> Layers:
    made = torch.randn(shape.num_layers, 2, shape.num_kv_heads, n, shape.head_dim, generator=generator)
    return {i: (made[i, 0], made[i, 1]) for i in layers or range(shape.num_layers)}


def three_parts(shape: ModelShape, i: int) -> Prefix:
    """Of lengths of their own; some parts missing, one for some layers only."""
    generator = torch.Generator().manual_seed(i)

    def part(n: int, layers: tuple[int, ...] = ()) -> Layers:
        return kv(shape, generator, n, layers)

    if i % 3 == 0:
        return Prefix("kv", part(3 + i), encoder=part(4), cross=part(5), is_seq2seq=True)
    if i % 3 == 1:
        return Prefix("kv", encoder=part(17), cross=part(2, (1,)), is_seq2seq=True)
    return Prefix("soft", embeddings=torch.randn(6, HIDDEN, generator=generator), is_seq2seq=True)


def peft_config(i: int, token_dim: int) -> Any:
    return (
        PromptTuningConfig(**SEQ2SEQ, num_virtual_tokens=3 + i),
        PrefixTuningConfig(**SEQ2SEQ, num_virtual_tokens=2 + i, token_dim=token_dim),
        PromptEncoderConfig(**SEQ2SEQ, num_virtual_tokens=4, encoder_hidden_size=16),
    )[i % 3]


World = tuple[Served, list[Expected], Path]


@pytest.fixture(scope="module", params=["t5", "bart"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param)
    seq2seq_model(SEQ2SEQ_FAMILIES[request.param]()).save_pretrained(folder / "model")
    letter_tokenizer().save_pretrained(folder / "model")
    settings = settings_for(folder / "data")
    for served in serve_in_thread(make_state(settings, ModelFiles(folder / "model", request.param))):
        yield served, [expected(i, folder, served) for i in range(NUM_TASKS)], folder / "model"


def expected(i: int, folder: Path, served: Served) -> Expected:
    """Upload task i; what the reference answers with it."""
    prompt = torch.randint(3, VOCAB, (2 + 5 * i % 29,)).tolist()
    if i % 2:
        prefix = three_parts(served.state.engine.shape, i // 2)
        answer = served.http.put(f"/v1/prefixes/task-{i}?accept_base=1", content=write_native(prefix), headers=NATIVE)
        plain = AutoModelForSeq2SeqLM.from_pretrained(folder / "model", attn_implementation=naive.NAME).eval()
        tokens, logits = naive.generate(plain, prompt, [[prefix]], NEW_TOKENS)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = served.state.engine.shape
            tokens, logits = ask_peft(i // 2, shape.num_kv_heads * shape.head_dim, prompt, folder)
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = {name: (folder / f"peft-{i // 2}" / name).read_bytes() for name in names}
        answer = served.http.put(f"/v1/prefixes/task-{i}?accept_base=1", files=files)
    assert answer.status_code == 201, answer.text
    return Expected(f"task-{i}", letters(prompt), tokens, logits)


def ask_peft(i: int, token_dim: int, prompt: list[int], folder: Path) -> tuple[list[int], torch.Tensor]:
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "model", attn_implementation="eager")
    model: Any = get_peft_model(base, peft_config(i, token_dim))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 1.5
    model.eval().save_pretrained(folder / f"peft-{i}")
    return generated(model, prompt, NEW_TOKENS)


def ask(url: str, case: Expected, delay_s: float = 0.0) -> list[int]:
    time.sleep(delay_s)
    parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "details": True}
    body = {"inputs": case.text, "parameters": parameters}
    answer = httpx.post(f"{url}/generate", params={"task": case.task}, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return [token["id"] for token in answer.json()["details"]["tokens"]]


def wrong(cases: list[Expected], answers: list[list[int]]) -> list[str]:
    found = []
    for case, answer in zip(cases, answers, strict=True):
        at = next((i for i in range(NEW_TOKENS) if answer[i : i + 1] != case.tokens[i : i + 1]), None)
        if at is not None:
            best = case.logits[at].topk(2).values
            if float(best[0] - best[1]) >= TIE:
                found.append(f"{case.task} at token {at}: {answer} for {case.tokens}")
    return found


def test_the_references_answers_can_prove_something(world: World) -> None:
    _, cases, _ = world
    assert len({token for case in cases for token in case.tokens}) >= 8
    assert len({tuple(case.tokens) for case in cases}) >= 12


def test_16_tasks_with_staggered_arrivals_answer_as_the_references(world: World) -> None:
    served, cases, _ = world
    for _ in range(2):  # cold, warm
        with ThreadPoolExecutor(NUM_TASKS) as clients:
            delays = [0.02 * i for i in range(NUM_TASKS)]
            answers = list(clients.map(ask, [served.url] * NUM_TASKS, cases, delays))
        assert not wrong(cases, answers)


def test_soft_rows_leave_their_neighbours_ids_alone(tmp_path: Path) -> None:
    """Pegasus scales embeddings where it is given ids, and takes embeddings as they come."""
    torch.manual_seed(5)
    config = PegasusConfig(**BART, scale_embedding=True, init_std=0.3)
    model = seq2seq_model(config)
    model.get_input_embeddings().weight.data *= 0.15  # so that answers vary
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    settings = settings_for(tmp_path / "data")
    for served in serve_in_thread(make_state(settings, ModelFiles(tmp_path / "model", "pegasus"))):
        cases = [expected(i, tmp_path, served) for i in range(0, NUM_TASKS, 2)]  # of PEFT, soft prompts and keys
        assert len({tuple(case.tokens) for case in cases}) >= 6
        with ThreadPoolExecutor(NUM_TASKS) as clients:
            answers = list(clients.map(ask, [served.url] * 3 * len(cases), 3 * cases))
        assert not wrong(3 * cases, answers)


def test_tasks_are_told_apart(world: World) -> None:
    served, cases, _ = world
    swapped = [Expected(cases[i ^ 1].task, case.text, case.tokens, case.logits) for i, case in enumerate(cases)]
    assert len(wrong(swapped, [ask(served.url, case) for case in swapped])) >= 12


def test_an_ensemble_and_a_composition_answer_as_the_naive_loop(world: World) -> None:
    served, cases, model_path = world
    parts = [three_parts(served.state.engine.shape, i) for i in range(3)]
    body = {"kind": "ensemble", "members": ["task-1", "task-3", "task-5"], "rule": "mean_probs"}
    assert served.http.put("/v1/prefixes/all", json=body).status_code == 201
    plain = AutoModelForSeq2SeqLM.from_pretrained(model_path, attn_implementation=naive.NAME).eval()
    prompt = [ord(letter) - 0x100 for letter in cases[0].text]
    for task, members in (("all", [[part] for part in parts]), ("task-1,task-3", [parts[:2]])):
        tokens, logits = naive.generate(plain, prompt, members, NEW_TOKENS)
        case = Expected(task, cases[0].text, tokens, logits)
        assert not wrong([case], [ask(served.url, case)])


def test_wrong_artefacts_for_an_encoder_decoder_are_refused(world: World) -> None:
    served, _, _ = world
    shape, generator = served.state.engine.shape, torch.Generator().manual_seed(1)
    infix: dict[str, Any] = {"placement": "infix", "separator": 5}
    for prefix, word in (
        (Prefix("kv", kv(shape, generator, 3)), "encoder-decoder"),
        (Prefix("soft", embeddings=torch.zeros(3, HIDDEN)), "encoder-decoder"),
        (Prefix("kv", kv(shape, generator, 3), is_seq2seq=True, **infix), "infix"),
        (Prefix("kv", encoder={7: kv(shape, generator, 3)[0]}, is_seq2seq=True), "encoder.layers.7"),
    ):
        answer = served.http.put("/v1/prefixes/wrong", content=write_native(prefix), headers=NATIVE)
        assert answer.status_code == 422
        assert word in answer.json()["detail"]
    assert served.http.get("/v1/prefixes/wrong").status_code == 404


def test_texts_that_do_not_fit_are_refused(world: World) -> None:
    served, cases, _ = world
    for text, new_tokens, word in ((letters([5] * 5000), 4, "encoder"), (cases[0].text, 5000, "decoder")):
        answer = served.generate(text, "task-1", max_new_tokens=new_tokens)
        assert answer.status_code == 422
        assert word in answer.json()["error"]
