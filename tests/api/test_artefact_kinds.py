"""Infixes, layer subsets, compositions and ensembles over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.byte_model import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS
from tests.conftest import NAME, NATIVE, Served, native

JSON = {"Content-Type": "application/json"}
SEPARATOR = 46  # a full stop
CLAIM: dict[str, Any] = {"base_model": NAME}


def kv(seed: int, n: int = 5, layers: tuple[int, ...] | None = None, **fields: Any) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(LAYERS, 2, KV_HEADS, n, HEAD_DIM, generator=generator)
    return write_native(Prefix("kv", {i: (made[i, 0], made[i, 1]) for i in layers or range(LAYERS)}, **CLAIM | fields))


def soft(seed: int, n: int = 4, **fields: Any) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, HIDDEN, generator=generator) * 0.5
    return write_native(Prefix("soft", embeddings=embeddings, **CLAIM | fields))


def put_ensemble(
    served: Served, task: str, members: list[str], rule: str = "mean_probs", **more: Any
) -> httpx.Response:
    body = {"kind": "ensemble", "members": members, "rule": rule} | more
    return served.http.put(f"/v1/prefixes/{task}", content=json.dumps(body), headers=JSON)


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    for word in words:
        assert word in response.json()["detail"]


def answer(served: Served, task: str | None, **parameters: Any) -> dict[str, Any]:
    response = served.generate("A fine film", task, max_new_tokens=20, ignore_eos=True, details=True, **parameters)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.fixture(scope="module")
def kinds(served: Served) -> dict[str, bytes]:
    files = {
        "k-kv": kv(1),
        "k-long": kv(2, 19),
        "k-subset": kv(3, layers=(1,)),
        "k-soft": soft(4),
        "k-soft-infix": soft(5, placement="infix"),
        "k-kv-infix": kv(6, placement="infix", separator=SEPARATOR),
    }
    for task, body in files.items():
        response = served.put(task, body)
        assert response.status_code == 201, response.text
    return files


def test_every_kind_uploads_answers_and_downloads(served: Served, kinds: dict[str, bytes]) -> None:
    texts = {None: answer(served, None)["generated_text"]}
    for task, body in kinds.items():
        texts[task] = answer(served, task)["generated_text"]
        described = served.http.get(f"/v1/prefixes/{task}").json()["versions"][0]
        assert described["placement"] == ("infix" if "infix" in task else "prefix")
        assert described.get("separator") == (SEPARATOR if task == "k-kv-infix" else None)
        assert described["residency"] == "resident"
        assert described["device_bytes"] > 0
        copy = served.http.get(f"/v1/prefixes/{task}/versions/1/file").content
        assert set(load(copy)) == set(load(body))
        assert served.put(task, copy).status_code == 200
    assert len(set(texts.values())) == len(texts)


def test_composition_concatenates_in_order(served: Served, kinds: dict[str, bytes]) -> None:
    both = answer(served, "k-kv,k-long")
    assert both["details"]["virtual_tokens"] == 24
    assert (both["details"]["task"], both["details"]["version"]) == ("k-kv,k-long", "1,1")
    joined = {name: torch.cat((load(kinds["k-kv"])[name], tensor), 1) for name, tensor in load(kinds["k-long"]).items()}
    served.put("k-joined", save(joined, {"format": "prefixserve/1", "kind": "kv"} | CLAIM))
    assert answer(served, "k-joined")["generated_text"] == both["generated_text"]
    response = served.generate("A fine film", "k-long@1,k-kv@1", max_new_tokens=20, ignore_eos=True)
    # Keys of prefixes carry no position: without a sliding window their order changes nothing.
    assert response.json()["generated_text"] == both["generated_text"] != answer(served, "k-kv")["generated_text"]
    assert (response.headers["X-Task"], response.headers["X-Prefix-Version"]) == ("k-long,k-kv", "1,1")
    with_infix = answer(served, "k-kv,k-soft-infix")
    assert with_infix["generated_text"] not in (both["generated_text"], answer(served, "k-kv")["generated_text"])
    by_name = served.http.post("/v1/completions", json={"model": "k-kv,k-long", "prompt": "x", "max_tokens": 2})
    assert by_name.status_code == 200


@pytest.mark.parametrize(
    ("task", "word"),
    [
        ("k-kv,k-soft", "k-soft"),
        ("k-soft,k-soft", "k-soft"),
        ("k-soft-infix,k-kv-infix", "infix"),
        ("k-kv,k-ensemble", "ensemble"),
        ("k-huge,k-huge,k-huge", "<= 64, got 120"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    served: Served, kinds: dict[str, bytes], task: str, word: str
) -> None:
    served.put("k-huge", kv(7, 40))
    put_ensemble(served, "k-ensemble", ["k-kv", "k-long"])
    response = served.generate("x", task)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert word in response.json()["error"]


@pytest.mark.parametrize("task", ["k-kv,", ",k-kv", "k-kv,nothing", "k-kv,,k-long", "k-kv,tiny"])
def test_a_part_that_is_not_there_is_not_found(served: Served, kinds: dict[str, bytes], task: str) -> None:
    assert served.generate("x", task).status_code == 404


def without(metadata: dict[str, str], body: bytes, **more: str) -> bytes:
    return save(load(body), {"format": "prefixserve/1"} | metadata | more)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (without({"kind": "kv", "placement": "infix"}, kv(1)), "separator"),
        (without({"kind": "kv", "placement": "infix"}, kv(1), separator="999999"), "separator"),
        (without({"kind": "kv", "placement": "infix"}, kv(1), separator="x"), "separator"),
        (without({"kind": "kv"}, kv(1), separator="4"), "separator"),
        (without({"kind": "soft", "placement": "infix"}, soft(1), separator="4"), "separator"),
        (without({"kind": "kv", "placement": "middle"}, kv(1)), "middle"),
        (
            save({f"encoder.{n}": t for n, t in load(kv(1)).items()}, {"format": "prefixserve/1", "kind": "kv"}),
            "decoder",
        ),
        (save({"encoder.embeddings": torch.zeros(2, HIDDEN)}, {"format": "prefixserve/1", "kind": "soft"}), "decoder"),
        (save({"layers.0.key": torch.zeros(2, 3, 8)}, {"format": "prefixserve/1", "kind": "kv"}), "layers.0.value"),
    ],
)
def test_wrong_kinds_are_refused(served: Served, body: bytes, word: str) -> None:
    assert_problem(served.put("k-wrong", body), 422, word)
    assert served.http.get("/v1/prefixes/k-wrong").status_code == 404


def test_an_ensemble_is_a_version_like_any_other(served: Served, kinds: dict[str, bytes]) -> None:
    response = put_ensemble(served, "e-mean", ["k-kv@1", "k-soft", "k-kv-infix"])
    assert response.status_code == 201, response.text
    manifest = response.json()
    assert (manifest["kind"], manifest["rule"]) == ("ensemble", "mean_probs")
    assert manifest["members"] == ["k-kv@1", "k-soft@1", "k-kv-infix@1"]
    assert manifest["num_virtual_tokens"] == 14
    assert put_ensemble(served, "e-mean", ["k-kv@1", "k-soft", "k-kv-infix"]).status_code == 200
    assert put_ensemble(served, "e-mean", ["k-kv@1", "k-soft"]).json()["version"] == 2
    served.http.post("/v1/prefixes/e-mean/activate", json={"version": 1})
    found = answer(served, "e-mean")
    assert found["details"]["virtual_tokens"] == 14
    assert found["details"]["generated_tokens"] == 20
    assert found["generated_text"] not in {answer(served, task)["generated_text"] for task in ("k-kv", "k-soft", None)}
    assert served.http.post("/v1/prefixes/e-mean/preload").json()["residency"] == "resident"
    assert served.http.post("/v1/prefixes/e-mean/pin").json()["pinned"] is True
    assert served.http.post("/v1/prefixes/e-mean/unpin").json()["pinned"] is False
    assert served.http.get("/v1/prefixes/e-mean/versions/1/file").status_code == 404
    events = served.http.post(
        "/generate_stream",
        params={"task": "e-mean"},
        json={"inputs": "A fine film", "parameters": {"max_new_tokens": 20, "ignore_eos": True}},
    ).text.split("\n\n")[:-1]
    texts = [json.loads(event.removeprefix("data:"))["token"]["text"] for event in events]
    assert "".join(texts) == found["generated_text"]


def test_ensemble_logprobs_are_those_of_the_mean(served: Served, kinds: dict[str, bytes]) -> None:
    put_ensemble(served, "e-two", ["k-kv", "k-long"])
    first = answer(served, "e-two")["details"]["tokens"][0]
    total = 0.0
    for task in ("k-kv", "k-long"):
        body = {"model": task, "prompt": "A fine film", "max_tokens": 1, "temperature": 0, "logprobs": 5}
        top = served.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["top_logprobs"][0]
        total += 2.718281828 ** top[first["text"]] if first["text"] in top else 0.0
    assert total / 2 == pytest.approx(2.718281828 ** first["logprob"], abs=0.02)


def test_members_of_an_ensemble_cannot_be_deleted(served: Served) -> None:
    for seed in (20, 21):
        served.put("m-one", native(seed))
    served.put("m-two", native(22))
    put_ensemble(served, "e-held", ["m-one@1", "m-two"])
    assert_problem(served.http.delete("/v1/prefixes/m-one/versions/1"), 409, "e-held@1")
    assert_problem(served.http.delete("/v1/prefixes/m-two"), 409, "e-held@1")
    assert served.generate("x", "e-held", max_new_tokens=1).status_code == 200
    assert served.http.delete("/v1/prefixes/e-held").status_code == 204
    assert served.http.delete("/v1/prefixes/m-two").status_code == 204
    assert served.http.delete("/v1/prefixes/m-one/versions/1").status_code == 204


def test_a_vote_takes_the_answer_of_most(served: Served, kinds: dict[str, bytes]) -> None:
    served.put("v-same", kinds["k-kv"])
    assert put_ensemble(served, "e-vote", ["k-kv", "k-long", "v-same"], "vote").status_code == 201
    found = answer(served, "e-vote")
    assert found["generated_text"] == answer(served, "k-kv")["generated_text"]
    votes = found["details"]["votes"]
    assert [vote["count"] for vote in votes] == [2, 1]
    assert votes[0]["text"] == found["generated_text"]
    tie = put_ensemble(served, "e-tie", ["k-kv", "k-long"], "vote")
    assert tie.status_code == 201
    votes = answer(served, "e-tie")["details"]["votes"]
    assert votes[0]["count"] == votes[1]["count"] == 1
    assert votes[0]["logprob"] > votes[1]["logprob"]
    assert answer(served, "e-tie")["generated_text"] == votes[0]["text"]
    body = {"model": "e-vote", "prompt": "A fine film", "max_tokens": 4, "temperature": 0, "n": 2}
    choices = served.http.post("/v1/completions", json=body).json()["choices"]
    assert choices[0]["text"] == choices[1]["text"]
    assert choices[0]["logprobs"] is None


@pytest.mark.parametrize(
    ("members", "rule", "words"),
    [
        (["k-kv"], "mean_probs", ["members"]),
        (["k-kv"] * 33, "mean_probs", ["members"]),
        (["k-kv", "k-long"], "median", ["rule"]),
        (["k-kv", "nothing"], "mean_probs", ["members[1]", "nothing"]),
        (["k-kv", "k-long@7"], "mean_probs", ["members[1]", "7"]),
        (["k-kv", "e-inner"], "mean_probs", ["members[1]", "ensemble"]),
        (["k-kv"] * 9, "mean_probs", ["9 rows", "8"]),
    ],
)
def test_wrong_ensembles_are_refused(
    served: Served, kinds: dict[str, bytes], members: list[str], rule: str, words: list[str]
) -> None:
    put_ensemble(served, "e-inner", ["k-kv", "k-long"])
    assert_problem(put_ensemble(served, "e-wrong", members, rule), 422, *words)
    assert served.http.get("/v1/prefixes/e-wrong").status_code == 404


def test_wrong_ensemble_bodies_are_refused(served: Served) -> None:
    for content in (b"", b"[]", b"{", b'{"kind": "other"}', b'{"kind": "ensemble", "rule": "vote"}'):
        assert_problem(served.http.put("/v1/prefixes/e-wrong", content=content, headers=JSON), 422)
    assert_problem(put_ensemble(served, "e-wrong", ["a", "b"], more=1), 422, "more")
    typed = served.http.put("/v1/prefixes/e-wrong", content=native(1), headers={"Content-Type": NATIVE})
    assert typed.status_code == 201
