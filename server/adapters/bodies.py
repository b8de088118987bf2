"""The two kinds of body that a new version comes in: a form, or JSON."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from polydelta.server.adapters.schemas import Body, NewVersion
from polydelta.server.body_limits import read_body
from polydelta.server.errors import ApiError, shown

FORM, JSON = "multipart/form-data", "application/json"
MAX_JSON_BYTES = 1 << 20

B = TypeVar("B", bound=Body)


def is_form(request: Request) -> bool:
    """Whether the body is a form; if not, it is JSON. Raises ApiError for anything else."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (FORM, JSON):
        raise ApiError(
            400,
            f"The body must be a form with files or JSON: send the header Content-Type: {FORM}; "
            f"boundary=... or Content-Type: {JSON}, not {shown(media_type)}.",
        )
    return media_type == FORM


async def read_json(request: Request, model: type[B]) -> B:
    """A JSON body. Raises ApiError, and what FastAPI raises for a body that the model refuses."""
    content = await read_body(request, MAX_JSON_BYTES)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first["ctx"]["error"]
            raise ApiError(400, f"The body is not valid JSON: {reason}.") from None
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from None


def described(model: type[NewVersion], *required: str) -> dict[str, Any]:
    """Both kinds for the API's description, as FastAPI does not see them."""
    fields: dict[str, Any] = {
        "id": {"type": "string"},
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "labels": {"type": "string", "description": "A JSON object of texts."},
    }
    form = {"type": "object", "required": ["files", *required], "properties": fields}
    schema = model.model_json_schema()
    # References are looked up from the root of the whole description, where these are not.
    (parts,) = schema.pop("$defs").values()
    schema["properties"]["compose"]["anyOf"][0]["items"] = parts
    content = {FORM: {"schema": form}, JSON: {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
