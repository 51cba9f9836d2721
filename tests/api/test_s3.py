"""A server whose files are on S3, and what it says when S3 is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for
from tests.prefix_store.s3_process import S3Process

PROMPT = "what is said"


@pytest.fixture
def on_s3(s3: S3Process, model_path: Path, tmp_path: Path) -> Iterator[Served]:
    settings = settings_for(tmp_path, blob_url=s3.make_bucket())
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


def test_files_away_are_nobodys_fault(s3: S3Process, on_s3: Served) -> None:
    """503, not a version's third fault, after which another one would answer in its place."""
    for task, seed in (("warm", 1), ("cold", 2), ("cold", 3)):
        assert on_s3.put(task, native(seed)).status_code == 201
    known = on_s3.generate(PROMPT, "warm").json()
    s3.kill()
    for _ in range(4):
        refused = on_s3.generate(PROMPT, "cold")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
        assert "expected to read the file of" in refused.json()["error"]
        assert "127.0.0.1" not in refused.text
    assert on_s3.generate(PROMPT, "warm").json() == known
    found = on_s3.http.get("/v1/prefixes/cold").json()
    assert (found["active"], found["quarantined"]) == (2, [])
    upload = on_s3.put("new", native(4))
    assert (upload.status_code, "Retry-After" in upload.headers) == (503, True)
    assert "expected to store a file of" in upload.json()["detail"]
    assert "127.0.0.1" not in upload.text
    assert on_s3.http.get("/v1/prefixes/new").status_code == 404
    assert on_s3.http.get("/readyz").status_code == 200
