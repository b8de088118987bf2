"""An adapter store in a folder of its own, and random adapters in it that came as uploads do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.publisher import Publisher
from polydelta.engine.build import build_engine
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.kv_spec import kv_page_bytes
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.decoder import base_layout

DTYPE, BLOCK_TOKENS = torch.bfloat16, 16
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL[:4]


class StoredAdapters:
    """Random LoRA adapters for the default model, and engines that serve them."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(None)
        self.model: ModelConfig = checkpoint.config
        self.layout: BaseLayout = base_layout(checkpoint.config, checkpoint.id)
        self.store = AdapterStore(StoreConfig(folder), FolderCatalog([]))
        self.tier = self._make_tier(self.layout, DTYPE)
        self._publisher = Publisher(self.store, self.tier, self.layout, UploadLimits())

    def close(self) -> None:
        self.store.close()

    def publish(self, adapter_id: str, rank: int, modules: Sequence[str], seed: int) -> AdapterRef:
        """A new adapter, uploaded, checked and packed: ready to be asked for."""
        files = {
            CONFIG_FILE: _config(rank, modules),
            WEIGHTS_FILE: self._weights(rank, modules, seed),
        }
        with self._publisher.begin() as upload:
            for name, content in files.items():
                upload.open(name)
                upload.write(content)
            return self.store.ref(self._publisher.publish(adapter_id, upload.finish()).record)

    def pages(self, ref: AdapterRef) -> int:
        """Pages of the pool that an adapter takes."""
        return -(-self.tier.load(ref).bytes_per_layer // self._page_bytes)

    def make_engine(self, pages: int, host_bytes: int, batch_size: int) -> Engine:
        """A running engine whose pool has so many pages."""
        config = EngineConfig(
            dtype="bfloat16",
            block_size=BLOCK_TOKENS,
            max_batch_size=batch_size,
            pool_bytes=pages * self._page_bytes * self.model.num_layers,
            host_adapter_bytes=host_bytes,
        )
        engine = build_engine(None, config, make_loader=self._make_tier)
        engine.start()
        return engine

    def packed_file(self, ref: AdapterRef) -> Path:
        (path,) = (self.store.packed_folder / str(ref.digest)).glob("*.packed")
        return path

    @property
    def _page_bytes(self) -> int:
        return kv_page_bytes(self.model, BLOCK_TOKENS, DTYPE)

    def _make_tier(
        self, layout: BaseLayout, dtype: torch.dtype, bits: int | None = None
    ) -> DiskTier:
        store = self.store
        return DiskTier(layout, dtype, store.packed_folder, store.content, 64 << 30, bits)

    def _weights(self, rank: int, modules: Sequence[str], seed: int) -> bytes:
        """The file that PEFT would write: bfloat16, B small enough to leave the text sane."""
        random, tensors = np.random.default_rng(seed), {}
        for name, (out_features, in_features) in self.layout.module_shapes.items():
            if name.rpartition(".")[2] in modules:
                key = f"base_model.model.{name}"
                tensors[f"{key}.lora_A.weight"] = _uniform(random, (rank, in_features), 0.02)
                tensors[f"{key}.lora_B.weight"] = _uniform(
                    random, (out_features, rank), 0.01 / rank**0.5
                )
        # On a thread that ends, for the reason given in engine/build.py.
        with ThreadPoolExecutor(max_workers=1) as saving:
            return saving.submit(save, tensors).result()


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Lets the system forget what it has in memory of files, so that they are read from disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _config(rank: int, modules: Sequence[str]) -> bytes:
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
    return json.dumps(config).encode()


def _uniform(random: np.random.Generator, shape: tuple[int, int], largest: float) -> Tensor:
    """bfloat16, by numpy: torch would leave a team of OpenMP threads in this one."""
    values = (2 * random.random(shape, dtype=np.float32) - 1) * np.float32(largest)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    return torch.from_numpy(halves).view(torch.bfloat16)
