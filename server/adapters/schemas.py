"""Request bodies and queries of the adapters' routes. What is not written here is refused by name.

A field set to null is a field left out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MAX_PAGE = 1000
# Version numbers have nine digits at most, as in `id@version`.
MAX_VERSION = 999_999_999
# Names in one sum; after saved compositions are taken apart there are fewer, see combine().
MAX_COMPOSE = 64


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ComposePart(Body):
    """One adapter of a weighted sum."""

    # `id`, which means its newest version, or `id@version`.
    id: str = Field(min_length=1)
    weight: float = 1.0


class NewVersion(Body):
    """A version that is made of what the server has: other adapters, or a folder."""

    compose: list[ComposePart] | None = Field(None, min_length=1, max_length=MAX_COMPOSE)
    # Of a folder on the server's machine, below one of its --adapter-root folders.
    path: str | None = Field(None, min_length=1)
    # Without them a new version has those of the one before.
    labels: dict[str, str] | None = None

    @field_validator("path")
    @classmethod
    def not_with_compose(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("compose") is not None:
            raise ValueError("does not go with compose; leave out one")
        return value


class CreateAdapter(NewVersion):
    """`POST /v1/adapters` with JSON."""

    id: str


class Rollback(Body):
    """`POST /v1/adapters/{id}/rollback`."""

    version: int = Field(ge=1, le=MAX_VERSION)


class Query(BaseModel):
    """Query parameters are text, so not strict; but none is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ListQuery(Query):
    """`GET /v1/adapters`."""

    limit: int = Field(100, ge=1, le=MAX_PAGE)
    # An id: the page begins after it.
    after: str | None = None
    # `key:value`; versions must have all that are given.
    label: list[str] = Field(default_factory=list)
    kind: str | None = None


class DeleteQuery(Query):
    """`DELETE /v1/adapters/{name}`."""

    # What is to become of versions that requests use now.
    in_use: Literal["refuse", "defer"] = "refuse"


class LoadLora(BaseModel):
    """`POST /v1/load_lora_adapter`. As in vLLM, fields that are not written here change nothing."""

    model_config = ConfigDict(frozen=True)

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class UnloadLora(BaseModel):
    """`POST /v1/unload_lora_adapter`. As in vLLM, other fields (`lora_int_id`) change nothing."""

    model_config = ConfigDict(frozen=True)

    lora_name: str = Field(min_length=1)
