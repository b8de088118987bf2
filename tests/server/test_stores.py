"""What the settings make of a store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polydelta.adapters_store import disk_tier as disk_tier_module
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.adapters_store.store import AdapterStore
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher


def test_the_engine_and_uploads_share_one_disk_tier(
    store: AdapterStore, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DiskTier] = []

    class Counted(DiskTier):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(disk_tier_module, "DiskTier", Counted)
    settings = ServerSettings(adapters=())
    make_tier = disk_tier(store, settings)
    loader = make_tier(engine.layout, torch.bfloat16, None)
    make_publisher(store, engine, settings, make_tier)
    assert made == [loader]
