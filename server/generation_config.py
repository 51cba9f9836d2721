"""The model's `generation_config.json`: what of it holds for requests, and what this server does not do."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from server.engine.generation_defaults import GenerationDefaults
from server.engine.logit_rules import LogitRules
from server.engine.model_config import read_config
from server.engine.stop_strings import StopStrings
from server.errors import ModelFilesError

log = structlog.get_logger()
FILE = "generation_config.json"
Use = Literal["auto", "none"]
T = TypeVar("T")
Fields = TypeVar("Fields", bound=BaseModel)


def _is_number(value: float) -> float:
    if math.isnan(value) or value == math.inf:
        raise ValueError(f"Input should be a number or -Infinity, got {value}")
    return value


TokenId = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, AfterValidator(_is_number)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]

# Fields that change answers and are not served, with the values that change none. Speculative decoding does not.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "max_time": (),
    "num_return_sequences": (1,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
OF_BEAMS: dict[str, tuple[Any, ...]] = {"length_penalty": (1,), "early_stopping": (False,)}


class GenerationFields(BaseModel):
    """The fields that are served, with transformers' names; a default changes nothing."""

    model_config = ConfigDict(strict=True, frozen=True)

    repetition_penalty: Penalty = 1.0
    encoder_repetition_penalty: Penalty = 1.0
    no_repeat_ngram_size: Length = 0
    encoder_no_repeat_ngram_size: Length = 0
    bad_words_ids: tuple[TokenIds, ...] = ()
    sequence_bias: tuple[tuple[TokenIds, Bias], ...] = ()
    min_length: Length = 0
    min_new_tokens: Length | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | TokenIds | None = None
    exponential_decay_length_penalty: tuple[Length, Factor] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    stop_strings: Text | tuple[Text, ...] = ()
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Share = 0.0

    @property
    def forced_eos_token_ids(self) -> tuple[int, ...]:
        return _as_tuple(self.forced_eos_token_id)

    @property
    def all_stop_strings(self) -> tuple[str, ...]:
        return _as_tuple(self.stop_strings)


class SpecialTokens(BaseModel):
    """The fields that hold whether or not the others are used."""

    model_config = ConfigDict(strict=True, frozen=True)

    eos_token_id: int | tuple[int, ...] | None = None
    decoder_start_token_id: TokenId | None = None
    forced_bos_token_id: TokenId | None = None


def read_generation_config(path: Path, use: Use) -> GenerationFields:
    """Of the model in folder `path`, as transformers reads it: from its own file, else from the model's config. With
    `none` only an encoder-decoder's forced first token holds, which is part of its start. Warns of fields that change
    answers and are not served. Raises ModelFilesError for values that cannot hold."""
    name = FILE if (path / FILE).is_file() else "config.json"
    try:
        config = GenerationConfig.from_pretrained(path, config_file_name=name, _from_model_config=name != FILE)
    except Exception as error:  # transformers raises what it likes for values that it does not expect
        raise ModelFilesError(f"{name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    model_config = read_config(path)
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", 2**31)
    special = _parse(SpecialTokens, config, name)
    start = {
        "decoder_start_token_id": special.decoder_start_token_id,
        "forced_bos_token_id": special.forced_bos_token_id,
    }
    _check_ids(name, {field: _as_tuple(token_id) for field, token_id in start.items()}, vocab_size)
    if use == "none":
        return GenerationFields(
            forced_bos_token_id=special.forced_bos_token_id if model_config.is_encoder_decoder else None
        )
    fields = _parse(GenerationFields, config, name)
    used = {
        "forced_eos_token_id": fields.forced_eos_token_ids,
        "bad_words_ids": tuple(chain(*fields.bad_words_ids)),
        "sequence_bias": tuple(chain(*(ids for ids, _ in fields.sequence_bias))),
    }
    _check_ids(name, used, vocab_size)
    changed: dict[str, Any] = {}  # fields that cannot hold as they are, and nobody would expect to stop the server
    for field in ("suppress_tokens", "begin_suppress_tokens"):
        known = tuple(token_id for token_id in getattr(fields, field) if 0 <= token_id < vocab_size)
        if known != getattr(fields, field):
            changed[field] = known
    if fields.temperature == 0:
        changed["temperature"] = 1.0
    unserved = [*_unserved(config), *changed, *(["eos_token_id"] if special.eos_token_id == () else [])]
    if unserved:
        log.warning("generation_config_not_served", fields=unserved)
    return fields.model_copy(update=changed)


def defaults_of(fields: GenerationFields, tokenizer: Any, use: Use) -> GenerationDefaults:
    """What requests are given. Raises ModelFilesError for stop strings that cannot be looked for."""
    strings = fields.all_stop_strings
    try:
        stop_strings = StopStrings(tokenizer, strings) if strings else None
    except ValueError as error:
        raise ModelFilesError(f"stop_strings {list(strings)!r} do not go with the tokenizer: {error}") from error
    return GenerationDefaults(
        rules=LogitRules(
            sequence_bias=tuple(dict(fields.sequence_bias).items()),
            encoder_repetition_penalty=fields.encoder_repetition_penalty,
            no_repeat_ngram_size=fields.no_repeat_ngram_size,
            encoder_no_repeat_ngram_size=fields.encoder_no_repeat_ngram_size,
            bad_words_ids=fields.bad_words_ids,
            min_length=fields.min_length,
            forced_bos_token_id=fields.forced_bos_token_id,
            forced_eos_token_ids=fields.forced_eos_token_ids,
            exponential_decay_length_penalty=fields.exponential_decay_length_penalty,
            suppress_tokens=fields.suppress_tokens,
            begin_suppress_tokens=fields.begin_suppress_tokens,
        ),
        repetition_penalty=fields.repetition_penalty,
        min_new_tokens=fields.min_new_tokens,
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        min_p=fields.min_p,
        stop_strings=stop_strings,
        in_force={} if use == "none" else fields.model_dump(mode="json", exclude_defaults=True),
    )


def _parse(kind: type[Fields], config: GenerationConfig, name: str) -> Fields:
    """The fields of `kind` that are set. Lists are JSON's, so a tuple is read from one."""
    values = {field: value for field in kind.model_fields if (value := getattr(config, field, None)) is not None}
    try:
        return kind.model_validate_json(json.dumps(values))
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):
            raise ModelFilesError(f"{name}: expected values of JSON, got {error}") from error
        first = error.errors()[0]
        field = str(first["loc"][0])
        got = repr(values[field])[:80]
        hint = "; mend it, or serve with --generation-config none" if kind is GenerationFields else ""
        raise ModelFilesError(f"{name}: {field} cannot be {got}: {first['msg']}{hint}") from error


def _check_ids(name: str, fields: dict[str, tuple[int, ...]], vocab_size: int) -> None:
    for field, token_ids in fields.items():
        if token_ids and max(token_ids) >= vocab_size:
            raise ModelFilesError(f"{name}: token ids of {field} must be < {vocab_size}, got {max(token_ids)}")


def _unserved(config: GenerationConfig) -> list[str]:
    """Fields of `config` that change answers and are not served, by name."""
    found = [field for field, neutral in UNSERVED.items() if getattr(config, field, None) not in (None, *neutral)]
    if "num_beams" in found:
        found += [field for field, neutral in OF_BEAMS.items() if getattr(config, field, None) not in (None, *neutral)]
    return found


def _as_tuple(value: T | tuple[T, ...] | None) -> tuple[T, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
