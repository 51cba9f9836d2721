"""Prefixes as resources: uploads, versions, ETags, residency, deletion; what is refused leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import socket
import warnings
from pathlib import Path

import httpx
import peft
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from tests.byte_model import HIDDEN, LAYERS
from tests.conftest import NAME, NATIVE, Served, native
from tests.waiting import eventually

PROBLEM = "application/problem+json"


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail"} <= set(body)
    for word in words:
        assert word in body["detail"]


@pytest.fixture(scope="module")
def peft_parts(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A prompt-tuned adapter, as PEFT saves it."""
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, base_model_name_or_path=str(model_path)
    )
    folder = tmp_path_factory.mktemp("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads attributes that transformers renames
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_upload_answers_with_the_manifest(served: Served) -> None:
    response = served.put("upload", native(10), note="first try")
    assert response.status_code == 201
    manifest = response.json()
    assert (manifest["task"], manifest["version"], manifest["active"], manifest["previous"]) == ("upload", 1, 1, None)
    assert (manifest["kind"], manifest["num_virtual_tokens"], manifest["note"]) == ("kv", 5, "first try")
    assert (manifest["base"], manifest["next_step"], manifest["unchanged"]) == ("name-match", None, False)
    assert manifest["fingerprint"]
    assert response.headers["ETag"]
    assert response.headers["Location"] == "/v1/prefixes/upload/versions/1"


def test_known_content_is_no_new_version(served: Served) -> None:
    assert served.put("known", native(11)).status_code == 201
    assert served.put("known", native(12)).status_code == 201
    again = served.put("known", native(11))
    assert again.status_code == 200
    assert again.json()["version"] == 1
    assert len(served.http.get("/v1/prefixes/known").json()["versions"]) == 2


def test_upload_without_a_content_type_is_a_native_file(served: Served) -> None:
    assert served.http.put("/v1/prefixes/untyped", content=native(13)).status_code == 201


def test_peft_folder_as_multipart(served: Served, peft_parts: dict[str, bytes]) -> None:
    response = served.http.put("/v1/prefixes/tuned?accept_base=1", files=peft_parts)
    assert response.status_code == 201, response.text
    assert (response.json()["kind"], response.json()["num_virtual_tokens"]) == ("soft", 6)
    bare, tuned = (served.generate("x", task, max_new_tokens=24).json() for task in (None, "tuned"))
    assert bare != tuned


def test_download_uploads_again_as_the_same_content(served: Served, peft_parts: dict[str, bytes]) -> None:
    served.http.put("/v1/prefixes/copied", files=peft_parts)
    response = served.http.get("/v1/prefixes/copied/versions/1/file")
    assert set(load(response.content)) == {"embeddings"}
    described = served.http.get("/v1/prefixes/copied/versions/1")
    assert response.headers["ETag"] == described.headers["ETag"] == f'"{described.json()["digest"]}"'
    copy = served.put("copy", response.content)
    assert copy.json()["base"] == "verified"
    assert copy.json()["digest"] == described.json()["digest"]


def test_activate_by_the_query(served: Served) -> None:
    assert served.put("query", native(20)).json()["active"] == 1
    assert served.put("query", native(21), activate="false").json()["active"] == 1
    third = served.put("query", native(22)).json()
    assert (third["active"], third["previous"]) == (3, 1)


def test_activate_and_roll_back(served: Served) -> None:
    for seed in (30, 31, 32):
        served.put("rolled", native(seed))
    digest = served.http.get("/v1/prefixes/rolled/versions/2").json()["digest"]
    for version, active in ((1, 1), ("previous", 3), ("2", 2), ("previous", 3), (digest[:12], 2)):
        response = served.http.post("/v1/prefixes/rolled/activate", json={"version": version})
        assert response.status_code == 200, response.text
        assert response.json()["active"] == active
        assert served.generate("x", "rolled", max_new_tokens=1).headers["X-Prefix-Version"] == str(active)
    assert_problem(served.http.post("/v1/prefixes/rolled/activate", json={"version": 9}), 404)
    assert_problem(served.http.post("/v1/prefixes/nothing/activate", json={"version": 1}), 404)
    for body in ({}, {"version": True}, {"version": 1, "more": 2}, {"version": 1, "weights": {"1": 1}}):
        assert_problem(served.http.post("/v1/prefixes/rolled/activate", json=body), 422)


def test_etags_guard_every_change(served: Served) -> None:
    def put(seed: int, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return served.http.put("/v1/prefixes/guarded", content=native(seed), headers={"Content-Type": NATIVE} | names)

    assert_problem(put(40, If_Match="*"), 412)
    first = put(40, If_None_Match="*")
    assert first.status_code == 201
    assert_problem(put(41, If_None_Match="*"), 412)
    second = put(41, If_Match=first.headers["ETag"])
    assert second.status_code == 201
    assert second.headers["ETag"] == served.http.get("/v1/prefixes/guarded").headers["ETag"]
    assert second.headers["ETag"] != first.headers["ETag"]
    assert_problem(put(42, If_Match=first.headers["ETag"]), 412)
    stale = {"If-Match": first.headers["ETag"]}
    assert_problem(served.http.post("/v1/prefixes/guarded/activate", json={"version": 1}, headers=stale), 412)
    assert_problem(served.http.delete("/v1/prefixes/guarded", headers=stale), 412)
    assert_problem(served.http.delete("/v1/prefixes/guarded/versions/1", headers=stale), 412)
    digest = served.http.get("/v1/prefixes/guarded/versions/1").headers["ETag"]
    gone = served.http.delete("/v1/prefixes/guarded/versions/1", headers={"If-Match": digest})
    assert gone.status_code in (200, 204)


def test_if_none_match_refuses_to_change_what_is_there(served: Served) -> None:
    for seed in (45, 46):
        served.put("kept", native(seed))
    before = served.http.get("/v1/prefixes/kept")
    star = {"If-None-Match": "*"}
    assert_problem(served.http.post("/v1/prefixes/kept/activate", json={"version": 1}, headers=star), 412)
    for path in ("kept", "kept/versions/1", "kept@1"):
        assert_problem(served.http.delete(f"/v1/prefixes/{path}", headers=star), 412)
    after = served.http.get("/v1/prefixes/kept")
    assert (after.json(), after.headers["ETag"]) == (before.json(), before.headers["ETag"])


def test_every_form_of_a_version_names_it(served: Served) -> None:
    for seed in (47, 48):
        served.put("forms", native(seed))
    first = served.http.get("/v1/prefixes/forms@1").json()
    assert first["version"] == 1
    for form in ("1", first["digest"][:12], first["digest"], "previous"):
        described = served.http.get(f"/v1/prefixes/forms@{form}")
        assert described.json() | {"residency": ""} == first | {"residency": ""}
        assert described.headers["ETag"] == f'"{first["digest"]}"'
        file = served.http.get(f"/v1/prefixes/forms/versions/{form}/file")
        assert hashlib.sha256(file.content).hexdigest() == first["digest"]
        assert served.http.post(f"/v1/prefixes/forms@{form}/preload").json()["task"] == "forms"
        assert served.state.engine.residency(f"default/{first['digest']}") == "resident"
        answer = served.generate("x", f"forms@{form}", max_new_tokens=1)
        assert (answer.headers["X-Task"], answer.headers["X-Prefix-Version"]) == ("forms", "1")
        completion = {"model": f"forms@{form}", "prompt": "x", "max_tokens": 1}
        assert served.http.post("/v1/completions", json=completion).json()["system_fingerprint"] == "1"
        chat = {"model": f"forms@{form}", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert served.http.post("/v1/chat/completions", json=chat).headers["X-Prefix-Version"] == "1"
    for form in (first["digest"][:11], "3", "0", "01", "latest", ""):
        assert_problem(served.http.get(f"/v1/prefixes/forms@{form}"), 404)
        assert served.generate("x", f"forms@{form}", max_new_tokens=1).status_code == 404


def test_what_is_of_the_task_takes_no_version(served: Served) -> None:
    served.put("whole", native(49))
    assert_problem(served.http.post("/v1/prefixes/whole@1/activate", json={"version": 1}), 422, "whole@1")
    for verb in ("pin", "unpin"):
        assert_problem(served.http.post(f"/v1/prefixes/whole@1/{verb}"), 422, "whole@1")
    assert_problem(served.put("whole@1", native(49)), 422, "whole@1")


def test_list_is_paged(served: Served) -> None:
    for i in range(3):
        served.put(f"page-{i}", native(50 + i))
    names: list[str] = []
    after = ""
    while True:
        page = served.http.get("/v1/prefixes", params={"limit": 2, "after": after}).json()
        assert len(page["prefixes"]) <= 2
        names += [task["task"] for task in page["prefixes"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert names == sorted(set(names))
    assert {"page-0", "page-1", "page-2"} <= set(names)
    for limit in (0, 1001, "x"):
        assert_problem(served.http.get("/v1/prefixes", params={"limit": limit}), 422, "limit")


def test_preload_pin_and_unpin(served: Served) -> None:
    served.put("pinned", native(60, 20))
    preloaded = served.http.post("/v1/prefixes/pinned/preload").json()
    assert preloaded["residency"] == "resident"
    assert preloaded["resident_bytes"] == preloaded["versions"][0]["device_bytes"] > 0
    assert served.http.post("/v1/prefixes/pinned/pin").json()["pinned"] is True
    for i in range(70):  # more than the pool holds
        served.put(f"filler-{i % 8}", native(1000 + i, 60))
        assert served.http.post(f"/v1/prefixes/filler-{i % 8}/preload").status_code == 200
    assert served.http.get("/v1/prefixes/pinned").json()["residency"] == "resident"
    assert served.state.engine.stats().prefix_bytes_used <= served.state.engine.stats().prefix_bytes_total
    assert served.http.post("/v1/prefixes/pinned/unpin").json()["pinned"] is False
    for verb in ("pin", "unpin", "preload"):
        assert_problem(served.http.post(f"/v1/prefixes/nothing/{verb}"), 404)


def test_delete_frees_memory_and_refuses_the_active_version(served: Served) -> None:
    for seed in (80, 81):
        served.put("deleted", native(seed))
        served.http.post("/v1/prefixes/deleted/preload")
    assert_problem(served.http.delete("/v1/prefixes/deleted/versions/2"), 409, "deleted")
    digests = [version["digest"] for version in served.http.get("/v1/prefixes/deleted").json()["versions"]]
    assert served.http.delete("/v1/prefixes/deleted/versions/1").status_code in (200, 204)
    assert_problem(served.http.delete("/v1/prefixes/deleted/versions/1"), 404)
    assert served.http.delete("/v1/prefixes/deleted").status_code in (200, 204)
    assert_problem(served.http.get("/v1/prefixes/deleted"), 404)
    assert_problem(served.http.delete("/v1/prefixes/deleted"), 404)
    assert served.generate("x", "deleted").status_code == 404
    eventually(lambda: {served.state.engine.residency(f"default/{digest}") for digest in digests} == {"cold"})


def test_running_request_finishes_on_its_deleted_version(served: Served) -> None:
    served.put("running", native(90))
    body = {"inputs": "x", "parameters": {"max_new_tokens": 150, "ignore_eos": True}}
    expected = served.http.post("/generate", params={"task": "running"}, json=body).json()["generated_text"]
    with served.http.stream("POST", "/generate_stream", params={"task": "running"}, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        assert served.http.delete("/v1/prefixes/running").status_code in (200, 204)
        last = list(lines)[-1]
    assert json.loads(last.removeprefix("data: "))["generated_text"] == expected


def test_version_of_a_deleted_task_is_never_numbered_again_as_old(served: Served) -> None:
    served.put("anew", native(95))
    etag = served.http.get("/v1/prefixes/anew").headers["ETag"]
    served.http.delete("/v1/prefixes/anew")
    assert served.put("anew", native(96)).headers["ETag"] != etag


def wrong_native(kind: str) -> bytes:
    good = load(native(100))
    metadata = {"format": "prefixserve/1", "kind": "kv"}
    if kind == "nan":
        good["layers.0.key"][0, 0, 0] = float("nan")
    elif kind == "huge":
        good["layers.1.value"][0, 0, 0] = 70_000.0
    elif kind == "width":
        good["layers.0.key"] = torch.zeros(2, 5, 9)
    elif kind == "layer":
        good[f"layers.{LAYERS}.key"] = good["layers.0.key"].clone()
    elif kind == "dtype":
        good = {name: tensor.to(torch.int32) for name, tensor in good.items()}
    elif kind == "long":
        good = {name: torch.zeros(2, 65, 8) for name in good}
    elif kind == "format":
        metadata = {}
    elif kind == "soft width":
        good, metadata = {"embeddings": torch.zeros(4, HIDDEN + 1)}, metadata | {"kind": "soft"}
    body = save(good, metadata)
    return {"cut off": body[:-7], "trailing": body + b"\0" * 8, "pickle": b"\x80\x04\x95" + body, "empty": b""}.get(
        kind, body
    )


KINDS = [
    "nan",
    "huge",
    "width",
    "layer",
    "dtype",
    "long",
    "format",
    "soft width",
    "cut off",
    "trailing",
    "pickle",
    "empty",
]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_artefact_is_refused_and_leaves_nothing(served: Served, kind: str) -> None:
    blobs = served.state.settings.data_dir / "blobs"
    before = sorted(path for path in blobs.rglob("*") if path.is_file())
    assert_problem(served.put("wrong", wrong_native(kind)), 422)
    assert_problem(served.http.get("/v1/prefixes/wrong"), 404)
    assert sorted(path for path in blobs.rglob("*") if path.is_file()) == before


def test_wrong_base_is_refused_unless_accepted(served: Served) -> None:
    other = native(110, base_model="someone/else")
    assert_problem(served.put("based", other), 422, "someone/else")
    assert served.put("based", other, accept_base="1").json()["base"] == "mismatch"
    assert served.put("based", native(111, base_model="/a/path")).json()["base"] == "unverified"
    assert_problem(served.put("based", native(112, fingerprint="0" * 64)), 422)


@pytest.mark.parametrize("name", ["Upper", "-dash", "a" * 65, NAME, "mini", "films@1", "a,b", "ünicode", "a b"])
def test_wrong_task_name_is_refused(served: Served, name: str) -> None:
    assert_problem(served.put(name, native(120)), 422)


def test_wrong_query_is_refused(served: Served) -> None:
    assert_problem(served.put("q", native(121), note="n" * 201), 422, "note")
    assert_problem(served.put("q", native(121), activate="maybe"), 422, "activate")
    assert_problem(served.put("q", native(121), index="0"), 422, "index")
    assert_problem(served.http.get("/v1/prefixes/q"), 404)


def test_wrong_parts_are_refused(served: Served, peft_parts: dict[str, bytes]) -> None:
    assert_problem(served.http.put("/v1/prefixes/p", files={"adapter_config.json": b"{}"}), 422, "adapter_model")
    assert_problem(served.http.put("/v1/prefixes/p", files=peft_parts | {"card.json": b"{}"}), 422, "card.json")
    lora = peft_parts | {"adapter_config.json": json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}).encode()}
    assert_problem(served.http.put("/v1/prefixes/p", files=lora), 422, "LORA")
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(served.http.put("/v1/prefixes/p", content=b"--x\r\nnonsense", headers=multipart), 422)
    multipart = {"Content-Type": "multipart/form-data"}
    assert_problem(served.http.put("/v1/prefixes/p", content=b"nonsense", headers=multipart), 400, "boundary")


@pytest.mark.parametrize("kind", ["application/zip", "text/plain", "application/x-tar"])
def test_other_types_are_unsupported(served: Served, kind: str) -> None:
    response = served.http.put("/v1/prefixes/typed", content=b"{}", headers={"Content-Type": kind})
    assert_problem(response, 415)


@pytest.mark.parametrize("ref", ["films@1", "films@previous"])
def test_task_at_version_describes_the_version(served: Served, films: str, ref: str) -> None:
    response = served.http.get(f"/v1/prefixes/{ref}")
    assert response.status_code == 200
    assert response.json()["version"] == 1


def test_upload_that_is_cut_off_leaves_nothing(served: Served) -> None:
    body = native(130)
    head = f"PUT /v1/prefixes/cut HTTP/1.1\r\nHost: localhost\r\nContent-Type: {NATIVE}\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:-100])
    assert_problem(served.http.get("/v1/prefixes/cut"), 404)
    assert served.put("cut", body).status_code == 201


def test_task_at_version_deletes_the_version(served: Served) -> None:
    for seed in (140, 141):
        served.put("atted", native(seed))
    assert served.http.delete("/v1/prefixes/atted@1").status_code == 204
    assert [v["version"] for v in served.http.get("/v1/prefixes/atted").json()["versions"]] == [2]


def test_prefix_whose_logits_are_not_finite_is_refused(served: Served) -> None:
    # Magnitudes within the bound that overflow in the products of a soft prompt's pass are rare on a tiny model:
    # a weight of the model that is NaN for this one request gives the same logits.
    weight = served.state.engine._engine.runner.model.model.norm.weight
    kept = weight[0].item()
    weight[0] = float("nan")
    try:
        assert_problem(served.put("faulty", native(150)), 422, "finite")
    finally:
        weight[0] = kept
    assert_problem(served.http.get("/v1/prefixes/faulty"), 404)
