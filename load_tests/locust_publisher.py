"""One user's uploads: an adapter is made, replaced, rolled back, deleted, and then another."""

from __future__ import annotations

from itertools import cycle
from typing import Any
from uuid import uuid4

from locust.contrib.fasthttp import FastHttpSession, ResponseContextManager

from load_tests.locust_models import Models
from load_tests.locust_refusals import accepted, back_off
from load_tests.locust_uploads import AdapterFiles, Form

ADAPTERS = "/v1/adapters"
# What rows of the statistics are called; with ids there would be as many rows.
ONE_ADAPTER = f"{ADAPTERS}/{{id}}"


class Publisher:
    """Has one adapter at a time, which all users may ask for as long as it is there."""

    def __init__(self, client: FastHttpSession, models: Models, files: AdapterFiles) -> None:
        self._client = client
        self._models = models
        self._files = files
        self._id: str | None = None
        self._versions: list[int] = []
        self._steps = cycle((self._replace, self._roll_back, self._delete))

    def step(self) -> None:
        """What happens next to the adapter."""
        if self._id is None:
            self._create()
        else:
            next(self._steps)()

    def close(self) -> None:
        """Leaves nothing on the server, not even what was being made when the user was stopped."""
        if self._id is not None:
            self._delete(missing_ok=True)

    def _create(self) -> None:
        # Known before it is there: `close` may come in between.
        self._id = f"locust-{uuid4().hex[:12]}"
        self._versions = []
        if self._publish("POST", ADAPTERS, ADAPTERS, **_sent(self._files.form(self._id))):
            self._models.add(self._id)
        else:
            self._id = None

    def _replace(self) -> None:
        form = _sent(self._files.form())
        self._publish("PUT", f"{ADAPTERS}/{self._id}", ONE_ADAPTER, **form)

    def _roll_back(self) -> None:
        path, name = f"{ADAPTERS}/{self._id}/rollback", f"{ONE_ADAPTER}/rollback"
        self._publish("POST", path, name, json={"version": self._versions[0]})

    def _delete(self, missing_ok: bool = False) -> None:
        # From here on nobody asks for it; the server lets those finish who did.
        adapter_id, self._id = self._id or "", None
        self._models.withdraw(adapter_id)
        path = f"{ADAPTERS}/{adapter_id}?in_use=defer"
        with self._request("DELETE", path, ONE_ADAPTER) as response:
            if missing_ok and response.status_code == 404:
                response.success()
            else:
                accepted(response, adapter_id)
        back_off(response)

    def _publish(self, method: str, path: str, name: str, **sent: Any) -> bool:
        """Whether there is a version that is newer than those before."""
        with self._request(method, path, name, **sent) as response:
            if published := accepted(response, self._id or ""):
                published = self._is_newer(response)
        back_off(response)
        return published

    def _is_newer(self, response: ResponseContextManager) -> bool:
        try:
            version = int(response.json()["version"])
        except (ValueError, KeyError, TypeError):
            response.failure("the answer has no version")
            return False
        # 200: the newest version already has that content.
        if response.status_code == 201 and version <= max(self._versions, default=0):
            response.failure("the new version's number is not above those before")
            return False
        self._versions.append(version)
        return True

    def _request(self, method: str, path: str, name: str, **sent: Any) -> ResponseContextManager:
        return self._client.request(method, path, name=name, catch_response=True, **sent)


def _sent(form: Form) -> dict[str, Any]:
    return {"data": form.body, "headers": {"Content-Type": form.content_type}}
