"""A registry behind TLS and a password, all of it in the URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from prefix_store.errors import UnavailableError
from prefix_store.mirror import Mirror
from prefix_store.prefix import Layout
from prefix_store.redis_registry import RedisRegistry
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS, add, new_version

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
    with pytest.raises(UnavailableError, match="invalid username-password pair") as caught:
        registry.revisions()
    assert WRONG not in str(caught.value)
    registry.close()


def test_another_authority_is_refused(process: RedisProcess, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    registry = RedisRegistry(process.url.partition("?")[0] + f"?ssl_ca_certs={tmp_path}/other.pem")
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        registry.revisions()
    registry.close()


def test_without_tls_nobody_is_let_in(process: RedisProcess) -> None:
    registry = RedisRegistry(process.url.replace("rediss://", "redis://").partition("?")[0])
    with pytest.raises(UnavailableError):
        registry.revisions()
    registry.close()
