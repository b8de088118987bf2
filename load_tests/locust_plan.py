"""What users are to do: what was asked for, and what the server has."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from locust.contrib.fasthttp import FastHttpSession

from load_tests.locust_models import Models
from load_tests.locust_options import Options
from load_tests.locust_publisher import ADAPTERS
from load_tests.locust_refusals import accepted, reason
from load_tests.locust_uploads import AdapterFiles

MODELS = "/v1/models"
# One token each in most vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word"
)


@dataclass(frozen=True)
class Plan:
    """Of one test; all users of a process have the same."""

    options: Options
    models: Models
    # None: nobody uploads.
    files: AdapterFiles | None

    def completion(self, model: str, max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a request. No two have the same prompt."""
        prompt = " ".join(random.choices(WORDS.split(), k=self.options.prompt_tokens.draw()))
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.options.ignore_eos:
            body["ignore_eos"] = True
        if self.options.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            return "/v1/chat/completions", body
        return "/v1/completions", body | {"prompt": prompt}


def make_plan(options: Options, client: FastHttpSession) -> Plan:
    """Asks the server what it has. Raises ValueError and OSError when nothing can be tested."""
    models = Models(_model_cards(options, client), options.models)
    return Plan(options, models, _files(options, client))


def _model_cards(options: Options, client: FastHttpSession) -> list[dict[str, Any]]:
    with client.get(MODELS, catch_response=True) as response:
        if response.status_code == 404 and options.models:
            # Some servers list nothing, and serve what is named.
            response.success()
            return []
        if not accepted(response):
            raise ValueError(f"{client.base_url}{MODELS}: {reason(response)}")
    try:
        return [card for card in response.json()["data"] if card["id"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{client.base_url}{MODELS}: the answer is no list of models") from None


def _files(options: Options, client: FastHttpSession) -> AdapterFiles | None:
    if options.uploads == "off" or not options.upload_share:
        return None
    if options.uploads == "auto":
        with client.get(f"{ADAPTERS}?limit=1", name=ADAPTERS, catch_response=True) as response:
            # An answer of either kind is what was wanted.
            response.success()
        if response.status_code != 200:
            return None
    return AdapterFiles(options.upload_folder)
