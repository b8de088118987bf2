"""Puts an engine together: model, pool, kernels, scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.disk_tier import AdapterLoader, FolderLoader
from polydelta.adapters_store.host_store import HostStore
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.eviction import CostModel
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import kv_page_bytes
from polydelta.engine.pool import PagePool
from polydelta.engine.residency import Residency
from polydelta.engine.runner import Runner
from polydelta.engine.scheduler import Scheduler, SchedulerLimits
from polydelta.engine.stats import StatsRecorder
from polydelta.kernels.ops import Kernels, kernels_for

# stage, done, total: drives a progress bar
Report = Callable[[str, int, int], None]
# From what adapters must fit and the dtype that they are computed in, to what reads them.
MakeLoader = Callable[[BaseLayout, torch.dtype], AdapterLoader]

# Where the model runs.
DEVICE = torch.device("cpu")


def no_report(stage: str, done: int, total: int) -> None:
    """For those who show no progress."""


def build_engine(
    model: str | None,
    config: EngineConfig,
    report: Report = no_report,
    make_loader: MakeLoader = FolderLoader,
) -> Engine:
    """model: None for the default, a path or a hub id. Raises ModelError."""
    report("Opening the model", 0, 1)
    checkpoint = open_checkpoint(model)
    report("Opening the model", 1, 1)
    kernels = kernels_for(DEVICE, torch_dtype(config.dtype))
    # On a thread that ends: a thread's OpenMP team lives as long as it does, and where teams have
    # more threads than there are cores, all of them sleep at every barrier instead of spinning
    # (a decode step of 16 tokens on 2 cores: 25 ms with one team, 36 ms beside an idle one).
    with ThreadPoolExecutor(max_workers=1) as loading:
        return loading.submit(assemble, checkpoint, config, kernels, report, make_loader).result()


def assemble(
    checkpoint: Checkpoint,
    config: EngineConfig,
    kernels: Kernels,
    report: Report = no_report,
    make_loader: MakeLoader = FolderLoader,
) -> Engine:
    """An engine for an opened checkpoint. Raises ModelError."""
    model, dtype = checkpoint.config, torch_dtype(config.dtype)
    page_bytes = kv_page_bytes(model, config.block_size, dtype)
    num_pages = config.pool_bytes // (page_bytes * model.num_layers)
    if num_pages < 2:
        raise ModelError(
            f"A pool of {config.pool_bytes} bytes holds {num_pages} pages of {page_bytes} bytes "
            f"in each of {model.num_layers} layers: give it more memory."
        )
    max_model_len = _max_model_len(config, model.context_length, num_pages)
    # Virtual tokens of adapters come on top of that; all tokens lie in the pool.
    max_positions = min(model.context_length, num_pages * config.block_size)
    bits = weight_bits(config.quantization)
    if bits is not None and config.fuse_after is not None:
        raise ModelError(
            f"quantization {config.quantization!r} and fuse_after {config.fuse_after} exclude each "
            "other: no adapter can be written into quantised weights. Leave one of them out."
        )
    weights = Weights(
        checkpoint.tensors, dtype, lambda done, total: report("Loading weights", done, total), bits
    )
    decoder = Decoder(model, weights, kernels, max_positions, dtype)
    layout = checkpoint_layout(checkpoint, dtype)
    host = HostStore(
        make_loader(layout, dtype), config.host_adapter_bytes, pin=DEVICE.type == "cuda"
    )
    runner = Runner(decoder, kernels, num_pages, config.block_size, dtype, host, config.fuse_after)

    wake, costs, pool = threading.Event(), CostModel(), PagePool(num_pages)
    kv = KVCache(pool, config.block_size, costs, config.prefix_caching)
    residency = Residency(
        pool, page_bytes, config.block_size, host, runner.bind_adapter, costs, wake.set
    )
    limits = SchedulerLimits(config.max_batch_tokens, config.max_batch_size, max_positions)
    scheduler = Scheduler(limits, pool, kv, residency)
    return Engine(
        checkpoint.id,
        checkpoint.tokenizer,
        max_model_len,
        model.vocab_size,
        layout,
        scheduler,
        AdapterControl(pool, kv, residency, scheduler),
        runner,
        StatsRecorder(pool, kv, residency, costs),
        wake,
        host.close,
        config.check_integrity,
    )


def torch_dtype(name: str) -> torch.dtype:
    """Raises ModelError for a dtype that is not served."""
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in dtypes:
        raise ModelError(f"dtype {name!r} is not supported: use {' or '.join(dtypes)}.")
    return dtypes[name]


def weight_bits(quantization: str | None) -> int | None:
    """Raises ModelError for a quantisation that there is not."""
    bits = {None: None, "int8": 8, "int4": 4}
    if quantization not in bits:
        raise ModelError(f"quantization {quantization!r} is not supported: use int8 or int4.")
    return bits[quantization]


def _max_model_len(config: EngineConfig, context_length: int, num_pages: int) -> int:
    """The longest sequence that is served, in tokens. Raises ModelError."""
    asked, fitting = config.max_model_len, num_pages * config.block_size
    if asked is None:
        # Half of the pool at most: a sequence shares it with its adapter.
        return min(context_length, fitting // 2)
    if not 1 < asked <= context_length:
        raise ModelError(
            f"max_model_len {asked} is not within the model's context window of "
            f"{context_length} tokens."
        )
    if asked >= fitting:
        raise ModelError(
            f"max_model_len {asked} leaves no room in a pool of {fitting} tokens: "
            "give it more memory, or ask for less."
        )
    return asked
