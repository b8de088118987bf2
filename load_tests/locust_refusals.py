"""What Locust's statistics say of an answer that is not the one that was asked for."""

from __future__ import annotations

import json

import gevent
from locust.contrib.fasthttp import ResponseContextManager

from load_tests.locust_stream import error_message

# Seconds after which one who was refused comes back, unless the server says something else.
RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 10.0
# Of the server's message, by which Locust groups failures.
MESSAGE_LENGTH = 200
# The server is there, and has no room now: rows of their own, for these answers come fast.
BUSY = (429, 503)


def accepted(response: ResponseContextManager, about: str = "") -> bool:
    """Whether the status is a success; if not, the response is made a failure that says why.

    about: the adapter's name, which is left out of messages so that there are few different ones.
    """
    status = response.status_code
    if 200 <= status < 300:
        return True
    if status in BUSY:
        response.request_meta["name"] += f" (refused, {status})"
    response.failure(reason(response, about))
    return False


def reason(response: ResponseContextManager, about: str = "") -> str:
    """Status and OpenAI's error message; else the body's beginning, or why no answer came."""
    if not response.status_code:
        return f"no answer: {vars(response).get('error')}"[:MESSAGE_LENGTH]
    text = response.text or ""
    try:
        body = json.loads(text)
        text = error_message(body.get("error", body))
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    if about:
        text = text.replace(about, "...")
    return f"{response.status_code}: {text}"[:MESSAGE_LENGTH]


def back_off(response: ResponseContextManager) -> None:
    """Waits, where asking again at once would only make it worse."""
    if response.status_code not in (0, *BUSY):
        return
    asked = str(response.headers.get("Retry-After", "")) if response.headers else ""
    # It may be a date, too.
    gevent.sleep(min(int(asked), MAX_RETRY_AFTER) if asked.isdecimal() else RETRY_AFTER)
