"""Settings of `serve`: every option of the command line, also as `PREFIXSERVE_…` in the environment."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1 << 20
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+|null", re.IGNORECASE)
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]*[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
SIZE = re.compile(r"[0-9]*\.?[0-9]+\s*[A-Za-z]*")


def default_data_dir() -> Path:
    """The user's data folder: `prefixserve` under `XDG_DATA_HOME` or `~/.local/share`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "prefixserve"


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without brackets or port) can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, whatever it resolves to
        return False


class Settings(BaseSettings):
    """Sizes are bytes (`512MiB` is understood), times seconds. Raises pydantic's ValidationError."""

    model_config = SettingsConfigDict(
        env_prefix="PREFIXSERVE_", extra="ignore", frozen=True, protected_namespaces=(), env_ignore_empty=True
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: str | None = Field(default=None, description="A local folder or hub name; none: the default model.")
    model_name: str | None = Field(default=None, description="The served name; none: from the model.")
    model_alias: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Other names of the base model, separated by commas in the environment."
    )
    model_revision: str | None = None
    data_dir: Path = Field(default_factory=default_data_dir, description="Registry and blobs.")
    redis_url: str | None = Field(default=None, repr=False, description="A registry that replicas share; none: SQLite.")
    blob_url: str | None = Field(default=None, description="Where files are, for fsspec; none: in data_dir.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    quantize: Literal["int8"] | None = Field(
        default=None, description="Weights and products in 8 bits; none: as they are."
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto", description="Defaults of requests from the model's own; none: its EOS and start tokens alone."
    )
    special_tokens_in_text: Literal["allow", "split"] = Field(
        default="allow", description="Control tokens in callers' texts: as in transformers, or as plain text."
    )
    kv_bytes: ByteSize | None = Field(
        default=None, gt=0, description="KV memory of the rows' text; none: from max_rows."
    )
    prefix_bytes: ByteSize | None = Field(default=None, gt=0, description="Memory of resident prefixes; none: derived.")
    max_rows: int = Field(default=64, ge=1, le=4096)
    max_step_tokens: int = Field(default=512, ge=1)
    max_queued: int = Field(default=256, ge=1)
    max_queue_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_virtual_tokens: int = Field(default=4096, ge=1)
    max_upload_bytes: ByteSize = Field(default=ByteSize(512 * MIB), gt=0)
    root_path: str = Field(default="", description="The prefix that a proxy serves this server behind, as /llm.")
    cors_allow_origin: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose pages may ask, or *; separated by commas in the environment."
    )
    max_connections: int = Field(default=4096, ge=1, description="At once; fewer where descriptors are short.")
    max_connections_per_peer: int | None = Field(
        default=None, ge=1, description="At once, of one address; none: 512, and of this machine max_connections."
    )
    trusted_proxy: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Addresses or networks that may have more, separated by commas in the environment."
    )
    max_requests_per_key: int | None = Field(
        default=None, ge=1, description="At once, of one key; none: max_rows and max_queued together."
    )
    operator_key_file: Path | None = Field(default=None, description="A file with one operator's key.")
    log_json: bool = False

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.strip("[]")

    @field_validator("model_alias", "trusted_proxy", "cors_allow_origin", mode="before")
    @classmethod
    def _split_lists(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("trusted_proxy")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            ipaddress.ip_network(each)
        return value

    @field_validator("cors_allow_origin")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each != "*" and not ORIGIN.fullmatch(each):
                raise ValueError(f"an origin must be as https://HOST or https://HOST:PORT, or *, got {each!r}")
        return value

    @field_validator("kv_bytes", "prefix_bytes", "max_upload_bytes", mode="before")
    @classmethod
    def _is_one_size(cls, value: object) -> object:
        if isinstance(value, str) and not SIZE.fullmatch(value.strip()):  # pydantic reads 1,5GiB as one byte
            raise ValueError(f"a size must be as 512MiB or 1.5GiB, got {value!r}")
        return value

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        path = value.rstrip("/")
        if path and not ROOT_PATH.fullmatch(path):
            raise ValueError(f"root_path must be as /llm or /team/llm, got {value!r}")
        return path

    @field_validator("data_dir", "operator_key_file")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _rows_fit_a_step(self) -> Settings:
        if self.max_step_tokens < self.max_rows:
            raise ValueError(f"max_step_tokens must be >= max_rows ({self.max_rows}), got {self.max_step_tokens}")
        return self
