"""A content whose file was damaged answers again as soon as it was uploaded again."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.api.faults import MAX_FAULTS
from tests.conftest import Served, native
from tests.waiting import eventually

PROMPT = "A fine film."


def file_of(served: Served, digest: str) -> Path:
    return next((served.state.settings.data_dir / "blobs").rglob(f"{digest}.safetensors"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_repaired_prefix_answers_at_once(served: Served, damage: str) -> None:
    body = native({"missing": 47110, "cut": 47111}[damage])  # that no other test made resident
    made = served.put(f"repaired-{damage}", body)
    path = file_of(served, made.json()["digest"])
    path.unlink() if damage == "missing" else path.write_bytes(body[:-1])
    for _ in range(2):  # the second is told what the first met
        assert served.generate(PROMPT, f"repaired-{damage}", max_new_tokens=1).status_code == 424
    assert served.put(f"repaired-{damage}", body).status_code == 200
    assert served.generate(PROMPT, f"repaired-{damage}", max_new_tokens=1).status_code == 200
    assert served.http.get(f"/v1/prefixes/repaired-{damage}/versions/1/file").content == path.read_bytes()
    assert served.http.delete(f"/v1/prefixes/repaired-{damage}").status_code in (200, 204)


def test_repaired_version_is_no_longer_quarantined(served: Served) -> None:
    for seed in (701, 702):
        made = served.put("twice", native(seed))
    file_of(served, made.json()["digest"]).write_bytes(b"")
    for _ in range(MAX_FAULTS):
        served.generate(PROMPT, "twice", max_new_tokens=1)
    eventually(lambda: served.http.get("/v1/prefixes/twice").json()["quarantined"] == [2])
    assert served.http.get("/v1/prefixes/twice").json()["active"] == 1
    assert served.put("twice", native(702)).status_code == 200
    assert served.http.get("/v1/prefixes/twice").json()["quarantined"] == []
    assert served.generate(PROMPT, "twice@2", max_new_tokens=1).status_code == 200
    assert served.http.delete("/v1/prefixes/twice").status_code in (200, 204)
