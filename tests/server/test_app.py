"""What the routes of one application share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.testclient import TestClient

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.store import AdapterStore
from polydelta.server.app import create_app
from polydelta.server.settings import ServerSettings


def test_adapters_are_checked_one_at_a_time_whatever_the_route(
    engine: Any, store: AdapterStore
) -> None:
    both, met = threading.Barrier(2), []

    class Meeting:
        def publish_path(self, adapter_id: str, *_: object) -> None:
            try:
                both.wait(0.5)
                met.append(adapter_id)
            except threading.BrokenBarrierError:
                both.reset()
            raise InvalidAdapterError("checked")

    publisher: Any = Meeting()
    app = create_app(engine, store, publisher, ServerSettings(adapters=()))
    with TestClient(app) as client, ThreadPoolExecutor(2) as threads:
        answers = [
            threads.submit(client.post, path, json=body)
            for path, body in (
                ("/v1/adapters", {"id": "a", "path": "/x"}),
                ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "/x"}),
            )
        ]
        assert ["checked" in answer.result().text for answer in answers] == [True, True]
    assert met == []
