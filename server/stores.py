"""The adapter store that the settings describe, and what a server needs around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import AdapterRef
from polydelta.server.settings import ServerSettings

if TYPE_CHECKING:  # these import torch, which takes seconds
    import torch

    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.disk_tier import DiskTier
    from polydelta.adapters_store.store import AdapterStore
    from polydelta.adapters_store.upload.publisher import Publisher
    from polydelta.engine.engine import Engine

MakeTier: TypeAlias = "Callable[[BaseLayout, torch.dtype, int | None], DiskTier]"

logger = logging.getLogger(__name__)


def open_store(settings: ServerSettings) -> AdapterStore:
    """Raises StoreError."""
    from polydelta.adapters_store.store import AdapterStore, StoreConfig

    config = StoreConfig(
        folder=settings.store,
        storage_url=settings.storage,
        catalog_url=None if settings.catalog is None else settings.catalog.get_secret_value(),
        quota_bytes=int(settings.store_quota),
    )
    return AdapterStore(config, FolderCatalog(settings.adapters))


def find_adapter(name: str, settings: ServerSettings) -> AdapterRef:
    """A folder by its path, or what the store that the settings describe calls `id` or
    `id@version`; its files are on this machine. Raises UnknownAdapterError, StoreError."""
    if Path(name).is_dir():
        return AdapterRef(Path(name).absolute().name, 1, Path(name))
    with closing(open_store(settings)) as store:
        try:
            ref = store.resolve(name)
        except UnknownAdapterError:
            raise UnknownAdapterError(
                f"There is no folder {name!r}, nor an adapter of this id: `polydelta adapters "
                "list` shows the ids; --store says where uploads lie."
            ) from None
        if ref.digest is not None:
            store.content.fetch(ref.digest)
        return ref


def disk_tier(store: AdapterStore, settings: ServerSettings) -> MakeTier:
    """What adapters are loaded with, once the model is known; the same one for the same model."""
    from polydelta.adapters_store.disk_tier import DiskTier

    @cache
    def make(layout: BaseLayout, dtype: torch.dtype, bits: int | None) -> DiskTier:
        capacity = int(settings.packed_cache)
        return DiskTier(layout, dtype, store.packed_folder, store.content, capacity, bits)

    return make


def pin_again(store: AdapterStore, engine: Engine) -> None:
    """Brings the adapters that were pinned before the restart back into the pool."""
    for record in store.catalog.pinned():
        loading = engine.load_adapter(store.ref(record), pin=True)
        loading.add_done_callback(partial(_warn, record.name))


def _warn(name: str, loading: Future[None]) -> None:
    if (error := loading.exception()) is not None:
        logger.warning("%s could not be pinned again: %s", name, error)


def make_publisher(
    store: AdapterStore, engine: Engine, settings: ServerSettings, make_tier: MakeTier
) -> Publisher:
    """What makes versions of uploads, checked against the engine's model."""
    from polydelta.adapters_store.upload.limits import UploadLimits
    from polydelta.adapters_store.upload.publisher import Publisher
    from polydelta.engine.device import torch_dtype

    limits = UploadLimits(
        max_file_bytes=int(settings.max_upload),
        max_total_bytes=int(settings.max_upload),
        max_rank=settings.max_adapter_rank,
    )
    tier = make_tier(engine.layout, torch_dtype(settings.dtype), settings.adapter_bits)
    roots = (*settings.adapter_root, *settings.adapters)
    return Publisher(store, tier, engine.layout, limits, roots)
