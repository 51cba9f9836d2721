"""A registry behind TLS and a password, all of it in the URL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from prefix_store.errors import UnavailableError, in_full
from prefix_store.mirror import Mirror
from prefix_store.prefix import Layout
from prefix_store.redis_registry import RedisRegistry
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, native, serve_in_thread, settings_for
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS, add, new_version
from tests.program import ROOT

PASSWORD, WRONG = "right-and-long-enough", "wrong-and-long-enough"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "localhost.pem")
    found = RedisProcess(folder, password=PASSWORD, certificate=folder / "localhost.pem", ca=folder / "ca.pem")
    found.start()
    yield found
    found.kill()


def test_changes_and_events_pass(process: RedisProcess, tmp_path: Path) -> None:
    mirror = Mirror(RedisRegistry(process.url), tmp_path / "mirror.sqlite")
    mirror.start()
    add(mirror, "films", new_version("a" * 64, Layout("kv", num_decoder_tokens=1)))
    task = mirror.get_task(OURS, "films")
    assert task is not None
    assert not mirror.is_degraded
    mirror.close()


def test_a_user_of_an_access_list_may(process: RedisProcess) -> None:
    with process.client() as client:
        client.acl_setuser(
            "prefixserve", enabled=True, passwords=[f"+{WRONG}"], keys=["*"], channels=["*"], commands=["+@all"]
        )
    registry = RedisRegistry(process.url.replace(f":{PASSWORD}@", f"prefixserve:{WRONG}@"))
    assert registry.list_tenants() == []
    registry.close()


def test_a_wrong_password_is_told_of_but_not_told(process: RedisProcess) -> None:
    registry = RedisRegistry(process.url.replace(PASSWORD, WRONG))
    with pytest.raises(UnavailableError) as caught:
        registry.revisions()
    assert "invalid username-password pair" in in_full(caught.value)
    assert WRONG not in in_full(caught.value)
    registry.close()


def test_another_authority_is_refused(process: RedisProcess, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    registry = RedisRegistry(process.url.partition("?")[0] + f"?ssl_ca_certs={tmp_path}/other.pem")
    with pytest.raises(UnavailableError) as caught:
        registry.revisions()
    assert "certificate verify failed" in in_full(caught.value)
    registry.close()


def test_without_tls_nobody_is_let_in(process: RedisProcess) -> None:
    registry = RedisRegistry(process.url.replace("rediss://", "redis://").partition("?")[0])
    with pytest.raises(UnavailableError):
        registry.revisions()
    registry.close()


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (f":{PASSWORD}/x@localhost:1/0", "got one that cannot be read"),
        (f":{PASSWORD}#x@localhost:1/0", "got one that cannot be read"),
        (f":{PASSWORD}[@localhost:1/0", "got one that cannot be read"),
        (f":{PASSWORD}@localhost:1/0?nonsense=1", "got: .* 'nonsense'"),
        (f":{PASSWORD}@localhost:1/0?ssl_cert_reqs=nonsense", "got: .* nonsense"),
    ],
)
def test_a_url_that_cannot_be_is_refused_without_its_password(rest: str, reason: str) -> None:
    with pytest.raises(UnavailableError, match=f"expected a URL as .*; {reason}") as caught:
        RedisRegistry(f"rediss://{rest}")
    assert PASSWORD[:5] not in str(caught.value)


def test_a_start_with_a_wrong_password_is_one_line_without_it(
    process: RedisProcess, model_path: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--model", str(model_path)]
    # In the environment: everyone on the machine sees a command's options.
    settings = {"PREFIXSERVE_REDIS_URL": process.url.replace(PASSWORD, WRONG), "PREFIXSERVE_DATA_DIR": str(tmp_path)}
    env = os.environ | settings
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the registry in Redis cannot be reached: invalid username-password pair")
    assert WRONG[:5] not in done.stdout + done.stderr


def test_a_server_shows_no_password(
    process: RedisProcess, model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = make_state(settings_for(tmp_path, redis_url=process.url), ModelFiles(model_path, NAME))
    for served in serve_in_thread(state):
        said = [served.http.get(path).text for path in ("/info", "/metrics", "/readyz", "/v1/prefixes")]
        assert served.put("films", native(1)).status_code == 201
        process.stop()
        refused = served.put("films", native(2))
        process.go_on()
        assert refused.status_code == 503
        said += [refused.text, repr(state.settings), str(state.settings)]
    said += capfd.readouterr()
    assert all(PASSWORD not in text for text in said)
