"""Every error leaves the server in OpenAI's body: `{"error": {message, type, param, code}}`.

`code` is the HTTP status, `type` its name in the table below, `param` the request field at fault.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from polydelta.server.metrics.refusals import REASON

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "PayloadTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error: its status, what to say, and the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        reason: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """reason: what it is counted as, where that is more than the status says.
        retry_after: seconds after which the same request may be taken; None: nobody knows."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.reason = reason
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Whole seconds, as HTTP has them: never too early, and never "at once"."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    fallback = "BadRequestError" if status < 500 else "InternalServerError"
    kind = TYPES.get(status, fallback)
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param), status, headers=headers)


def shown(value: object) -> str:
    """A value as an error message quotes it: one line, long ones cut in the middle."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def field_path(location: Sequence[int | str]) -> str | None:
    """Where in the body, as OpenAI writes it: `messages[0].content`; None for the body itself."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def explain(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """One pydantic error of a request as (message, param)."""
    # The first part says where it is: "body", "query" or "path".
    param = field_path(error["loc"][1:])
    match error["type"]:
        case "json_invalid":
            where = error["loc"][-1]
            reason = error["ctx"]["error"]
            return f"The body is not valid JSON: {reason} (at character {where}).", None
        case "extra_forbidden":
            return f"{param}: this field is not supported; leave it out.", param
        case "missing" if param is not None:
            return f"{param}: this field is required.", param
    if param is None:
        return (
            "The body must be a JSON object, sent with the header Content-Type: application/json.",
            None,
        )
    reason = error["msg"].removeprefix("Value error, ")
    return f"{param}: {reason} (got {shown(error['input'])}).", param


async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
    request.scope[REASON] = error.reason
    return error_response(error.status, error.message, error.param, error.headers)


async def on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    message, param = explain(error.errors()[0])
    return error_response(400, message, param)


async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    """Starlette's own refusals: no such route, wrong method, a body that cannot be decoded."""
    message = str(error.detail)
    if error.status_code == 404:
        message = (
            f"There is no route {shown(request.url.path)} here; see /docs for those there are."
        )
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
    return error_response(error.status_code, message, headers=error.headers)


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """A bug of ours: the log has the traceback, the client gets no inner detail."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(500, "The server failed on this request; its log says why.")


def install_error_handlers(app: FastAPI) -> None:
    """The one table: exception -> answer."""
    app.exception_handler(ApiError)(on_api_error)
    app.exception_handler(RequestValidationError)(on_invalid_request)
    app.exception_handler(HTTPException)(on_http_exception)
    app.exception_handler(Exception)(on_unexpected)
