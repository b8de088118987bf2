"""Request bodies of the OpenAI routes. What is not written here is refused by name.

A field set to null is a field left out, as OpenAI has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from polydelta.adapters_store.composition import MAX_SHARES
from polydelta.engine.kv_composition import Option, in_full, names_of

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_LOGPROBS = 20
SEED_LIMIT = 2**63 - 1
PRIORITY_LIMIT = 2**31 - 1

# Fields of OpenAI's that change nothing here: labels, billing, storage and routing.
IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Fields that are not supported, with the values that ask for nothing.
ASKS_NOTHING: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "include_obfuscation": (True, False),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


def _changes_nothing(name: str, value: object) -> bool:
    return value is None or name in IGNORED or value in ASKS_NOTHING.get(name, ())


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def leave_out_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: v for name, v in data.items() if not _changes_nothing(name, v)}


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _parse_prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Text, token ids, or a list of either -> one entry for each prompt."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value:
        prompts = [value] if type(value[0]) is int else value
    else:
        raise ValueError("must be text, a list of token ids, or a list that is not empty of either")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(
            f"at most {MAX_PROMPTS} prompts go in one request, here are {len(prompts)}"
        )
    return tuple(_parse_prompt(prompt) for prompt in prompts)


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text


def _parse_prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return _whole_characters(value)
    if isinstance(value, list) and value:
        for token in value:
            if type(token) is not int:
                raise ValueError(f"a prompt of token ids holds {token!r:.40}, not an integer")
        return tuple(value)
    raise ValueError("an empty prompt, or one that is neither text nor token ids")


Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(
        _parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class AdapterWeight(Body):
    """One adapter of a sum."""

    id: str = Field(min_length=1)
    weight: float = 1.0


class GenerationFields(Body):
    """What completions and chat share: how to sample, when to stop, how to answer."""

    model: str = Field(min_length=1)
    # A weighted sum of adapters, in place of the one that `model` may name.
    adapters: list[AdapterWeight] = Field(default_factory=list, max_length=MAX_SHARES)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    # -1 and 0 keep all tokens.
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-SEED_LIMIT - 1, le=SEED_LIMIT)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    # Token id -> what is added to its logit. JSON has only strings for keys.
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)

    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_as_stops, json_schema_input_type=str | list[str]),
    ] = Field(default_factory=list, max_length=MAX_STOPS)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    # Who waits goes in this order, lower first, where the server's policy is to ask for it.
    priority: int = Field(0, ge=-PRIORITY_LIMIT - 1, le=PRIORITY_LIMIT)
    # Cached prefixes are shared between requests of the same salt only; without one, with all
    # that have none.
    cache_salt: Annotated[str, AfterValidator(_whole_characters)] = Field("", min_length=1)
    kv_select: Annotated[str, Field(max_length=64)] | None = Field(
        None,
        description="What is read of the KV cache, where it is not to be what the server reads by"
        f" itself: {', '.join(map(in_full, names_of(Option.SELECT)))}."
        " Numbers may be left out. Which of them a server allows depends on how it was started.",
    )

    @property
    def weighted_adapters(self) -> list[tuple[str, float]]:
        return [(adapter.id, adapter.weight) for adapter in self.adapters]

    @field_validator("stream_options")
    @classmethod
    def only_with_stream(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("only goes with stream=true; leave it out or set stream")
        return value


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    # Checked after `n`: the two multiply.
    prompt: Prompts
    # How many alternatives to report for each token.
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @field_validator("prompt")
    @classmethod
    def not_too_many_choices(
        cls, value: tuple[str | tuple[int, ...], ...], info: ValidationInfo
    ) -> tuple[str | tuple[int, ...], ...]:
        choices = len(value) * int(info.data.get("n") or 1)
        if choices > MAX_PROMPTS:
            raise ValueError(
                f"{len(value)} prompts with n={info.data['n']} are {choices} choices; one request "
                f"has at most {MAX_PROMPTS}"
            )
        return value

    @field_validator("echo")
    @classmethod
    def not_with_logprobs(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("logprobs") is not None:
            raise ValueError("log probabilities of the prompt are not supported; leave out one")
        return value


def _join_parts(value: object) -> object:
    """Content as text: a list of text parts becomes their texts, one after the other by line."""
    if isinstance(value, str) or not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"only parts of type 'text' are supported, not {kind!r:.40}")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of type 'text' needs the field 'text' with a string")
        if unknown := part.keys() - {"type", "text"}:
            raise ValueError(f"a part of type 'text' has no field {min(unknown)!r:.40}")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_join_parts, json_schema_input_type=str | list[Any]),
        AfterValidator(_whole_characters),
    ]
    name: Annotated[str, AfterValidator(_whole_characters)] | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates want it; they know OpenAI's newer `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("max_completion_tokens")
    @classmethod
    def one_limit_only(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") is not None:
            raise ValueError("is the newer name of max_tokens; give one of the two")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def only_with_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("only goes with logprobs=true; leave it out or set logprobs")
        return value
