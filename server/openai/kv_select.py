"""What a request asks to be read of the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydelta.engine.kv_setup import Selection, requested
from polydelta.server.errors import ApiError
from polydelta.server.openai.schemas import GenerationFields

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine


def kv_selection(engine: Engine, body: GenerationFields) -> Selection | None:
    """None for what the server reads by itself. Raises ApiError 400 for what is not safe here."""
    if body.kv_select is None:
        return None
    try:
        return requested(engine.kv_setup, body.kv_select)
    except ValueError as error:
        raise ApiError(400, f"kv_select: {error}", "kv_select") from None
