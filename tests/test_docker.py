"""What the container files say of the program is so. Their form is checked by `make lint`."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefix_store.redis_server import DURABLE
from server.config import Settings
from server.key_file import SECRETS

ROOT = Path(__file__).parents[1]
PREFIX = "PREFIXSERVE_"
READ_ELSEWHERE = {"CACHE_DIR"}  # by `model_files.cache_dir`


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "docker" / "Dockerfile").read_text()


def test_every_variable_is_a_setting(services: dict[str, Any], dockerfile: str) -> None:
    """One that is misspelt says nothing."""
    names = set(services["server"]["environment"]) | set(re.findall(rf"{PREFIX}[A-Z_]+", dockerfile))
    known = {name.upper() for name in Settings.model_fields} | READ_ELSEWHERE
    assert {name.removeprefix(PREFIX) for name in names} <= known


def test_redis_loses_nothing_that_it_acknowledged(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    given = {name.removeprefix("--"): value for name, value in zip(command[1::2], command[2::2], strict=True)}
    assert given == DURABLE
    assert services["redis"]["volumes"] == ["redis:/data"]
    assert "ports" not in services["redis"]


def test_the_server_is_nobody_special_and_keeps_its_data(services: dict[str, Any], dockerfile: str) -> None:
    (user,) = re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)
    assert int(user) > 0
    (volumes,) = re.findall(r"^VOLUME (.+)$", dockerfile, re.MULTILINE)
    kept = {volume.partition(":")[2] for volume in services["server"]["volumes"]}
    assert set(yaml.safe_load(volumes)) == kept
    assert {"DATA_DIR=/data", "CACHE_DIR=/cache"} <= set(re.findall(rf"{PREFIX}(\S+_DIR=\S+)", dockerfile))


def test_the_operators_key_is_where_containers_have_secrets(services: dict[str, Any]) -> None:
    """There a file of root's that every user of the container may read is taken."""
    environment = services["server"]["environment"]
    path = Path(environment["PREFIXSERVE_OPERATOR_KEY_FILE"])
    assert path.parent in SECRETS
    assert path.name in services["server"]["secrets"]


def test_what_is_copied_is_there_and_the_key_is_not_sent(dockerfile: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch("docker/operator.key", f"{name}*") for name in sent)
