"""Compositions and ensembles where it is tight: seeds, pins, a small prefix pool, what a delete leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.model_files import ModelFiles
from server.start import make_state
from tests.api.test_artefact_kinds import assert_problem, kv, put_ensemble
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for

SAMPLED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def voted(served: Served) -> str:
    for i in range(3):
        served.put(f"edge-{i}", native(70 + i))
    assert put_ensemble(served, "edge-vote", ["edge-0", "edge-1", "edge-2"], "vote").status_code == 201
    return "edge-vote"


@pytest.fixture(scope="module")
def tight(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A prefix pool of three blocks; tasks a, b and c take one each."""
    settings = settings_for(tmp_path_factory.mktemp("tight"), prefix_bytes=3 * 4096, max_queue_s=20.0)
    for served in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
        for i, task in enumerate("abc"):
            assert served.put(task, native(80 + i)).status_code == 201
        assert served.put("wide", kv(90, 17)).status_code == 201  # two blocks
        yield served


def test_a_vote_takes_any_seed(served: Served, voted: str) -> None:
    assert served.generate("x", voted, seed=2**64 - 1, **SAMPLED).status_code == 200
    body = {"model": voted, "prompt": "x", "max_tokens": 3, "seed": -1, "n": 2}
    response = served.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text


def test_a_votes_seed_gives_the_same_answer_again(served: Served, voted: str) -> None:
    winners = set()
    for inputs in ("A fine film", "x", "yes", "0"):
        first = served.generate(inputs, voted, details=True, **SAMPLED).json()
        seed = first["details"]["seed"]
        again = served.generate(inputs, voted, details=True, seed=seed, **SAMPLED).json()
        first_votes, votes = ({vote["text"]: vote["count"] for vote in a["details"]["votes"]} for a in (first, again))
        assert votes == first_votes
        assert again["details"]["seed"] == seed
        winners.add(first["generated_text"])
    assert len(winners) > 1


def test_no_voter_draws_as_one_of_another_choice(served: Served) -> None:
    """The same member twice: were seeds counted up alone, a choice's second voter would be the next one's first."""
    served.put("edge-again", native(70))
    put_ensemble(served, "edge-same", ["edge-0", "edge-again"], "vote")
    body = {"model": "edge-same", "prompt": "x", "max_tokens": 12, "seed": 1, "n": 8, "temperature": 2}
    choices = served.http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"]
    assert len({choice["text"] for choice in choices}) == 8


def test_a_deleted_ensemble_leaves_its_members_memory_under_their_names(served: Served) -> None:
    for i in range(2):
        served.put(f"owner-{i}", native(100 + i))
    put_ensemble(served, "short-lived", ["owner-0", "owner-1"])
    assert served.generate("x", "short-lived", max_new_tokens=1).status_code == 200
    assert served.http.delete("/v1/prefixes/short-lived").status_code == 204
    metrics = served.http.get("/metrics").text
    assert 'task="short-lived"' not in metrics
    for i in range(2):
        assert f'prefixserve_task_resident_bytes{{task="owner-{i}",tenant="default"}}' in metrics


def test_a_deleted_task_gives_up_its_label_where_another_has_the_same_content(served: Served) -> None:
    for task in ("twin-one", "twin-two"):
        served.put(task, native(110))
        assert served.generate("x", task, max_new_tokens=1).status_code == 200
    assert served.http.delete("/v1/prefixes/twin-two").status_code == 204
    assert 'task="twin-two"' not in served.http.get("/metrics").text
    assert served.http.get("/v1/prefixes/twin-one").json()["residency"] == "resident"


def test_an_ensemble_is_matched_with_the_model_as_its_worst_member(served: Served) -> None:
    served.put("of-nothing", native(121, base_model=None))
    served.put("shared-content", native(122))
    served.put("of-this", served.http.get("/v1/prefixes/shared-content/versions/1/file").content)
    served.put("of-another", native(120, base_model="other/model"), accept_base="1")
    for other, base in (("of-this", "verified"), ("of-nothing@1", "unverified"), ("of-another", "mismatch")):
        assert put_ensemble(served, "matched", ["of-this", other]).json()["base"] == base


def test_a_composition_of_too_many_parts_is_refused_unread(served: Served, voted: str) -> None:
    for task, status in ((",".join(["edge-0"] * 32), 422), (",".join(["nothing"] * 33), 422)):
        response = served.generate("x", None, adapter_id=task)
        assert response.status_code == status
    assert "32" in response.json()["error"]
    body = {"model": ",".join([f"edge-0@{served.http.get('/v1/prefixes/edge-0').json()['versions'][0]['digest']}"] * 4)}
    assert served.http.post("/v1/completions", json=body | {"prompt": "x", "max_tokens": 1}).status_code == 200
    started_s = time.monotonic()
    assert served.generate("x", None, adapter_id=",".join(["edge-0"] * 100_000)).status_code == 422
    assert time.monotonic() - started_s < 20


def test_chat_fills_the_context_behind_an_infix_with_a_separator(served: Served) -> None:
    served.put("chat-infix", kv(130, placement="infix", separator=46))
    put_ensemble(served, "chat-both", ["chat-infix", "chat-infix"])
    for model in ("chat-infix", "chat-both"):
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
        response = served.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        assert usage["total_tokens"] == 256 - 5 - 1


def test_what_cannot_stand_beside_pinned_prefixes_is_refused_at_once(tight: Served) -> None:
    """It would wait in vain, and hold up the loads of all behind it."""
    put_ensemble(tight, "pair", ["a", "b"])
    assert tight.http.post("/v1/prefixes/wide/pin").status_code == 200
    try:
        with ThreadPoolExecutor() as pool:
            started_s = time.monotonic()
            waiting = [pool.submit(tight.generate, "x", task, max_new_tokens=1) for task in ("a,b", "pair")]
            time.sleep(0.05)
            assert tight.generate("x", "c", max_new_tokens=1).status_code == 200
            refused = [future.result() for future in waiting]
        assert time.monotonic() - started_s < 15
        for response in refused:
            assert response.status_code == 503
            assert "pinned" in response.json()["error"]
            assert "Retry-After" in response.headers
    finally:
        tight.http.post("/v1/prefixes/wide/unpin")
    assert tight.generate("x", "a,b", max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("call", ["pin", "preload"])
def test_all_members_become_resident_or_the_call_fails(tight: Served, call: str) -> None:
    put_ensemble(tight, "pair", ["a", "b"])
    assert tight.http.post("/v1/prefixes/wide/pin").status_code == 200
    try:
        assert_problem(tight.http.post(f"/v1/prefixes/pair/{call}"), 503)
        assert tight.http.get("/v1/prefixes/pair").json()["pinned"] is False
    finally:
        tight.http.post("/v1/prefixes/wide/unpin")
    found = tight.http.post(f"/v1/prefixes/pair/{call}").json()
    assert found["residency"] == "resident"
    tight.http.post("/v1/prefixes/pair/unpin")


def test_content_that_comes_back_while_its_last_row_runs_stays(served: Served) -> None:
    """A delete waits for the row; meanwhile the same content is uploaded and pinned."""
    served.put("phoenix", native(140))
    with ThreadPoolExecutor(14) as pool:
        running = [pool.submit(served.generate, "x", "phoenix", max_new_tokens=240, ignore_eos=True) for _ in range(14)]
        while (stats := served.state.engine.stats()).num_running + stats.num_waiting < len(running):
            assert not any(future.done() for future in running)
            time.sleep(0.001)
        assert served.http.delete("/v1/prefixes/phoenix").status_code == 204
        served.put("phoenix", native(140))
        assert served.http.post("/v1/prefixes/phoenix/pin").status_code == 200
        assert not all(future.done() for future in running)
        assert {future.result().status_code for future in running} == {200}
    time.sleep(0.3)
    assert served.http.get("/v1/prefixes/phoenix").json()["residency"] == "resident"
    served.http.post("/v1/prefixes/phoenix/unpin")
