"""What comes over the wire. A field that is known and not served may be null or neutral; else it is refused by name."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, StrictInt, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from prefix_store.ensemble import MAX_MEMBERS, Rule
from server.api.wire import WireModel
from server.engine.generation_defaults import GenerationDefaults
from server.engine.sampling_params import SamplingParams

Text = Annotated[str, StringConstraints(max_length=2**22)]  # a bound makes pydantic refuse lone surrogates
Name = Annotated[str, StringConstraints(max_length=512)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
MAX_STOPS = 16
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
NumTokens = Annotated[int, Field(ge=1, lt=2**31)]  # how many fit is the context's business
VersionNumber = Annotated[int, Field(ge=1, lt=10**9)]
VersionText = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MAX_CHOICES = 16
DEFAULT_NEW_TOKENS = 128  # TGI's
MAX_PARTS = 32  # of a composition
MAX_MODEL_LENGTH = MAX_PARTS * 195  # an owner, /, a name, @, a digest, a comma
MAX_PROMPTS = 1000
UNSUPPORTED = "unsupported"
LeastTokens = Annotated[int, Field(ge=0, lt=2**31)]
T = TypeVar("T")


def refuse(values: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """Refuse fields that are not served and have another value than null or a neutral one."""
    if isinstance(values, dict):
        for name, allowed in neutral.items():
            value = values.get(name)
            if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
                got = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(str(value)[:60])
                raise PydanticCustomError(
                    UNSUPPORTED,
                    "{field} is not supported by this server, got {value}",
                    {"field": name, "value": got},
                )
        return {name: value for name, value in values.items() if name not in neutral}
    return values


def _either(given: T | None, default: T) -> T:
    return default if given is None else given


class GenerateParameters(WireModel):
    """TGI's parameters. Sampling is on with `do_sample`, or, as in TGI, when it is left out and a warper is given."""

    max_new_tokens: NumTokens | None = None
    min_new_tokens: LeastTokens | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0, le=100)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: Seed | None = None
    stop: Stops | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    ignore_eos: bool | None = None
    adapter_id: Annotated[str, StringConstraints(max_length=MAX_MODEL_LENGTH)] | None = None
    raw: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, values: Any) -> Any:
        return refuse(
            values,
            {
                "best_of": (1,),
                "decoder_input_details": (False,),
                "frequency_penalty": (0, 0.0),
                "grammar": (),
                "top_n_tokens": (0,),
                "truncate": (),
                "typical_p": (1, 1.0),
                "watermark": (False,),
                "response_format": (),
                "constrain": (),
                # what LoRAX adds, and its client always sends
                "adapter_source": (),
                "api_token": (),
                "ignore_eos_token": (False,),
                "merged_adapters": (),
                "return_k_alternatives": (),
            },
        )

    def sampling_params(self, max_new_tokens: int, defaults: GenerationDefaults) -> SamplingParams:
        """`defaults` hold where the request says nothing; they do not turn sampling on."""
        warps = self.temperature not in (None, 1.0) or bool(self.top_k) or self.top_p not in (None, 1.0)
        do_sample = warps if self.do_sample is None else self.do_sample
        seed = self.seed
        if do_sample and seed is None:
            seed = secrets.randbits(63)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=_either(self.temperature, defaults.temperature),
            top_k=_either(self.top_k, defaults.top_k),
            top_p=_either(self.top_p, defaults.top_p),
            min_p=_either(self.min_p, defaults.min_p),
            repetition_penalty=_either(self.repetition_penalty, defaults.repetition_penalty),
            min_new_tokens=_either(self.min_new_tokens, defaults.min_new_tokens),
            seed=seed,
            stop=tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            num_top_logprobs=0 if self.details else None,
            rules=defaults.rules,
            stop_strings=defaults.stop_strings if self.stop is None else None,
        )


class GenerateRequest(WireModel):
    """`POST /generate`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "A fine film.\nSentiment:", "parameters": {"max_new_tokens": 4}}]}
    )
    inputs: Text = Field(min_length=1)
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class StreamOptions(WireModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIRequest(WireModel):
    """What completions and chat share. Sampling is on unless `temperature` is 0."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LENGTH)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: LeastTokens | None = None
    user: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, values: Any) -> Any:
        return refuse(
            values,
            {
                "frequency_penalty": (0, 0.0),
                "presence_penalty": (0, 0.0),
                "logit_bias": ({},),
                "best_of": (1,),
                "echo": (False,),
                "suffix": ("",),
                "tools": ([],),
                "tool_choice": ("none",),
                "response_format": ({"type": "text"},),
                "parallel_tool_calls": (),
                "functions": (),
                "function_call": (),
                "modalities": (["text"],),
                "audio": (),
                "prediction": (),
                "reasoning_effort": (),
                "service_tier": ("auto", "default"),
                "store": (False,),
                "metadata": ({},),
                "web_search_options": (),
                "verbosity": (),
            },
        )

    def sampling_params(
        self, max_new_tokens: int, num_top_logprobs: int | None, choice: int, defaults: GenerationDefaults
    ) -> SamplingParams:
        """`defaults` hold where the request says nothing. Their stop strings are cut off as a request's are."""
        do_sample = self.temperature != 0
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop_strings = defaults.stop_strings if self.stop is None else None
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=_either(self.temperature or None, defaults.temperature),
            top_k=max(_either(self.top_k, defaults.top_k), 0),
            top_p=_either(self.top_p, defaults.top_p),
            min_p=_either(self.min_p, defaults.min_p),
            repetition_penalty=_either(self.repetition_penalty, defaults.repetition_penalty),
            min_new_tokens=_either(self.min_tokens, defaults.min_new_tokens),
            seed=(seed + choice) % 2**64 if do_sample else None,
            stop=tuple(stop) if stop_strings is None else stop_strings.strings,
            include_stop=False,
            ignore_eos=bool(self.ignore_eos),
            num_top_logprobs=num_top_logprobs,
            rules=defaults.rules,
            stop_strings=stop_strings,
        )


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "films", "prompt": "A fine film.\nSentiment:", "max_tokens": 4}]}
    )
    prompt: Text | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
    max_tokens: NumTokens | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _one_prompt(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and len(self.prompt) != 1:
            raise ValueError(f"prompt must be one text, got a list of {len(self.prompt)}")
        return self

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextPart(WireModel):
    type: Literal["text"]
    text: Text


class ChatMessage(WireModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PROMPTS)]
    name: Name | None = None

    def as_template_input(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(OpenAIRequest):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "films", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}]
        }
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class ActivateRequest(WireModel):
    """`POST /v1/prefixes/T/activate`: a number, 12 or more hex digits of the digest, or `previous`; or several numbers
    with weights, each request going to one of them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"version": 2}, {"version": "previous"}, {"weights": {"3": 90, "4": 10}}]}
    )
    version: Annotated[StrictInt, Field(ge=0, lt=10**9)] | VersionText | None = None
    weights: dict[VersionNumber, Annotated[StrictInt, Field(ge=1, le=1_000_000)]] | None = Field(
        None, min_length=1, max_length=4
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> ActivateRequest:
        if (self.version is None) == (self.weights is None):
            raise ValueError("expected version or weights, got " + ("both" if self.weights else "neither"))
        return self


class ShareRequest(WireModel):
    """`POST /v1/prefixes/T/share`: the tenants that may use it; none takes it back."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tenants": ["north", "south"]}, {"tenants": []}]})
    tenants: list[Annotated[str, StringConstraints(pattern=r"^([a-z0-9][a-z0-9._-]{0,63}|\*)$")]] = Field(
        max_length=1000
    )


EXAMPLE_ENSEMBLE: dict[str, Any] = {"kind": "ensemble", "members": ["films@1", "films@2"], "rule": "mean_probs"}


class EnsembleRequest(WireModel):
    """`PUT /v1/prefixes/T` as JSON. `members` are `T@V`, or `T` for the version that is active now."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_ENSEMBLE]})
    kind: Literal["ensemble"]
    members: list[Annotated[str, StringConstraints(min_length=1, max_length=140)]] = Field(
        min_length=2, max_length=MAX_MEMBERS
    )
    rule: Rule
