"""What a version needs to go live, and what ends a canary, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from structlog.testing import capture_logs

from prefix_store.local_files import CONFIG, WEIGHTS
from server.start import publish_examples
from tests.byte_model import HIDDEN
from tests.conftest import Served, make_tenant, native


def activate(served: Served, task: str, body: dict[str, Any], **query: str) -> httpx.Response:
    return served.http.post(f"/v1/prefixes/{task}/activate", params=query, json=body)


@pytest.fixture
def fingerprint(served: Served) -> str:
    found: str = served.http.get("/info").json()["fingerprint"]
    return found


def test_upload_that_claims_a_folder_is_stored_and_says_how_it_goes_live(served: Served, fingerprint: str) -> None:
    made = served.put("claims", native(1001, base_model="/models/another"))
    assert made.status_code == 201
    found = made.json()
    assert (found["base"], found["claimed_base"], found["base_accepted"]) == ("unverified", "/models/another", False)
    assert (found["version"], found["active"], found["unchanged"]) == (1, None, False)
    for word in ("'/models/another'", "base_fingerprint=", "accept_base=1", "--accept-base"):
        assert word in found["next_step"]
    answer = served.generate("x", "claims")
    assert (answer.status_code, answer.json()["error"]) == (404, "task 'claims' has no active version; stored: 1")
    assert served.generate("x", "claims@1", max_new_tokens=1).status_code == 200
    assert "claims" not in {one["id"] for one in served.http.get("/v1/models").json()["data"]}
    again = served.put("claims", native(1001, base_model="/models/another"), base_fingerprint=fingerprint)
    assert (again.status_code, again.json()["base"], again.json()["active"]) == (200, "verified", 1)
    assert (again.json()["unchanged"], again.json()["next_step"]) == (True, None)


def test_upload_that_is_to_be_live_unverified_is_refused_and_not_stored(served: Served) -> None:
    body = native(1002, base_model=None)
    refused = served.put("refused", body, activate="true")
    assert refused.status_code == 422
    assert "the file names no base model" in refused.json()["detail"]
    assert "accept_base=1" in refused.json()["detail"]
    assert served.http.get("/v1/prefixes/refused").status_code == 404
    assert served.put("refused", body, activate="true", accept_base="1").json()["active"] == 1


@pytest.mark.parametrize("body", [{"version": 2}, {"version": "2"}, {"weights": {"1": 90, "2": 10}}])
def test_unverified_version_is_refused_by_activate_until_accepted(served: Served, body: dict[str, Any]) -> None:
    served.http.delete("/v1/prefixes/accepted")
    served.put("accepted", native(1003))
    served.put("accepted", native(1004, base_model="./model"))
    refused = activate(served, "accepted", body)
    assert refused.status_code == 422
    assert "'./model'" in refused.json()["detail"]
    found = activate(served, "accepted", body, accept_base="1").json()
    assert (found["weights"] is None, found["active"]) == (("version" in body), 2 if "version" in body else 1)
    shown = served.http.get("/v1/prefixes/accepted@2").json()
    assert (shown["base"], shown["base_accepted"], shown["next_step"]) == ("unverified", True, None)
    assert activate(served, "accepted", body).status_code == 200


@pytest.mark.parametrize("given", ["", "0", "F" * 64, "g" * 64, "0" * 63, "0" * 65])
def test_what_is_no_fingerprint_is_refused(served: Served, given: str) -> None:
    assert served.put("printed", native(1005), base_fingerprint=given).status_code == 422
    assert served.http.get("/v1/prefixes/printed").status_code == 404


def test_fingerprint_of_another_model_is_a_mismatch(served: Served) -> None:
    for base_model in ("tiny", "./model", None):
        refused = served.put("printed", native(1006, base_model=base_model), base_fingerprint="0" * 64)
        assert (refused.status_code, "000000000000" in refused.json()["detail"]) == (422, True)
    made = served.put("printed", native(1006), base_fingerprint="0" * 64, accept_base="1").json()
    assert (made["base"], made["base_accepted"], made["active"]) == ("mismatch", True, 1)


def test_ensemble_takes_no_fingerprint(served: Served, films: str) -> None:
    body = {"kind": "ensemble", "members": [f"{films}@1", f"{films}@2"], "rule": "vote"}
    refused = served.http.put("/v1/prefixes/printed-both?base_fingerprint=" + "0" * 64, json=body)
    assert (refused.status_code, "an ensemble's members have theirs" in refused.json()["detail"]) == (422, True)


def test_acceptance_is_in_the_audit_with_who_accepted(keyed: Served) -> None:
    tenant = make_tenant(keyed, "accepting")
    tenant.put("t", native(1, base_model="/x"))
    tenant.put("t", native(2, base_model="/x"), accept_base="1")
    activate(tenant, "t", {"version": 1}, accept_base="1")
    found = tenant.http.get("/v1/audit").json()["entries"]
    told = [(one["action"], one["subject"], len(one["actor"])) for one in found if "base" in one["action"]]
    assert told == [("accept-base", "t@1", 12), ("accept-base", "t@2", 12)]


def test_key_that_may_not_publish_makes_nothing_live_by_accepting(keyed: Served) -> None:
    tenant = make_tenant(keyed, "careful")
    made = tenant.http.post("/v1/tenants/careful/keys", json={"scopes": ["upload"]}).json()
    uploader = keyed.as_key(made["key"])
    for _ in range(2):
        stored = uploader.put("t", native(1, base_model="/x"), accept_base="1").json()
        assert (stored["active"], stored["base_accepted"]) == (None, True)
    assert tenant.http.get("/v1/prefixes/t").json()["active"] is None


def test_known_content_says_so_and_keeps_its_note(served: Served) -> None:
    for seed in (1010, 1011):
        served.put("again", native(seed), note="first")
    again = served.put("again", native(1010), note="second")
    found = again.json()
    assert (again.status_code, found["unchanged"], found["version"], found["active"]) == (200, True, 1, 2)
    assert (found["note"], served.http.get("/v1/prefixes/again@1").json()["note"]) == ("second", "second")
    assert served.put("again", native(1010), activate="true").json()["active"] == 1


@pytest.mark.parametrize("weights", [{"1": 90, "2": 10}, {"1": 10, "2": 90}, {"2": 100}, {"2": 50, "3": 50}])
def test_previous_names_what_was_live_before_the_weights_on_every_route(
    served: Served, weights: dict[str, int]
) -> None:
    served.http.delete("/v1/prefixes/canary")
    for seed in (1020, 1021, 1022):
        served.put("canary", native(seed), activate="false")
    activate(served, "canary", {"version": 3})
    activate(served, "canary", {"version": 1})
    shown = activate(served, "canary", {"weights": weights}).json()
    assert (shown["previous"], shown["weights"]) == (1, weights)
    assert served.http.get("/v1/prefixes/canary").json()["previous"] == 1
    described = served.http.get("/v1/prefixes/canary@previous").json()
    assert (described["version"], described["previous"], described["weights"]) == (1, 1, weights)
    headers = served.generate("x", "canary@previous", max_new_tokens=1).headers
    assert headers["X-Prefix-Version"] == "1"
    body = {"model": "canary@previous", "prompt": "x", "max_tokens": 1}
    assert served.http.post("/v1/completions", json=body).headers["X-Prefix-Version"] == "1"
    members = {"kind": "ensemble", "members": ["canary@previous", "canary@3"], "rule": "vote"}
    made = served.http.put(
        "/v1/prefixes/canaries", content=json.dumps(members), headers={"Content-Type": "application/json"}
    )
    assert made.json()["members"] == ["canary@1", "canary@3"]
    served.http.delete("/v1/prefixes/canaries")
    refused = served.http.delete("/v1/prefixes/canary@previous")
    assert refused.status_code == 409
    assert served.put("canary", native(1023)).json()["active"] == shown["active"]
    rolled = activate(served, "canary", {"version": "previous"}).json()
    assert (rolled["active"], rolled["weights"], rolled["previous"]) == (1, None, 3)
    assert activate(served, "canary", {"version": "previous"}).json()["active"] == 3


def test_example_that_claims_another_folder_is_stored_and_the_log_says_why(
    served: Served, model_path: Path, tmp_path: Path
) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    bases = {"example-named": "tiny", "example-here": str(model_path), "example-elsewhere": "/models/another"}
    for task, base in bases.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}))
        (tmp_path / task / WEIGHTS).write_bytes(save({"prompt_embeddings": torch.ones(4, HIDDEN)}))
    with capture_logs() as lines:
        publish_examples(served.state.store, tmp_path)
    (line,) = lines
    assert (line["event"], line["task"]) == ("example_not_live", "example-elsewhere")
    assert "'/models/another'" in line["reason"]
    listed = {one["id"] for one in served.http.get("/v1/models").json()["data"]}
    assert listed & set(bases) == {"example-named", "example-here"}
    assert served.http.get("/v1/prefixes/example-here@1").json()["base"] == "verified"
