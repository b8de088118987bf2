"""Puts an engine together: model, pool, kernels, scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.disk_tier import AdapterLoader, FolderLoader
from polydelta.adapters_store.host_store import HostStore
from polydelta.adapters_store.row_codes import BITS
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.adapter_usage import AdapterUsage
from polydelta.engine.config import EngineConfig
from polydelta.engine.device import choose_device, dtype_on, limits_for
from polydelta.engine.engine import Engine
from polydelta.engine.eviction import CostModel
from polydelta.engine.gpu_memory import memory_for_pool
from polydelta.engine.host_pages import DistantPages
from polydelta.engine.kv_build import kv_rules, kv_setup, kv_spec
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import Weights
from polydelta.engine.overload import QueueLimits
from polydelta.engine.policies import POLICIES
from polydelta.engine.pool_sizes import PoolSizes
from polydelta.engine.pools import Pools
from polydelta.engine.preemption import Preemption, Swapping
from polydelta.engine.residency import Residency
from polydelta.engine.runner import Runner
from polydelta.engine.scheduler import Scheduler, SchedulerLimits
from polydelta.engine.stats_recorder import StatsRecorder
from polydelta.kernels.kv_selection import InfLLM
from polydelta.kernels.ops import Kernels, kernels_for

# stage, done, total: drives a progress bar
Report = Callable[[str, int, int], None]
# From what adapters must fit, the dtype that they are computed in, and the bits of their low-rank
# matrices where these are fewer, to what reads them.
MakeLoader = Callable[[BaseLayout, torch.dtype, int | None], AdapterLoader]


def no_report(stage: str, done: int, total: int) -> None:
    """For those who show no progress."""


def build_engine(
    model: str | None,
    config: EngineConfig,
    report: Report = no_report,
    make_loader: MakeLoader = FolderLoader,
) -> Engine:
    """model: None for the default, a path or a hub id. Raises ModelError."""
    device = choose_device(config.device)
    kernels = kernels_for(device, dtype_on(device, config.dtype))
    report("Opening the model", 0, 1)
    checkpoint = open_checkpoint(model)
    report("Opening the model", 1, 1)
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
    device, model = kernels.device, checkpoint.config
    limits, dtype = limits_for(device, config), dtype_on(device, config.dtype)
    setup = kv_setup(config, model, device, limits)
    spec = kv_spec(config, setup, model, dtype, checkpoint.id)
    rules = kv_rules(setup, spec)
    # Where it is known before the weights are read, what does not fit is refused at once.
    pool_bytes = limits.pool_bytes
    sizes = None
    if pool_bytes is not None:
        sizes = PoolSizes.of(pool_bytes, spec, limits.max_batch_size, config)
    if config.scheduling_policy not in POLICIES:
        raise ModelError(
            f"scheduling_policy {config.scheduling_policy!r} is not supported: use one of "
            f"{', '.join(POLICIES)}."
        )
    if config.adapter_bits not in (None, *BITS):
        raise ModelError(f"adapter_bits {config.adapter_bits} is not supported: use 8 or 4.")
    bits = weight_bits(config.quantization)
    if bits is not None and config.fuse_after is not None:
        raise ModelError(
            f"quantization {config.quantization!r} and fuse_after {config.fuse_after} exclude each "
            "other: no adapter can be written into quantised weights. Leave one of them out."
        )
    if bits is not None and device.type != "cpu":
        raise ModelError(
            f"quantization {config.quantization!r} is served on CPUs only: leave it out, or use "
            "device cpu."
        )
    if device.type == "cuda":
        # Of this thread; another GPU than the first may have been chosen.
        torch.cuda.set_device(device)
    weights = Weights(
        checkpoint.tensors,
        dtype,
        lambda done, total: report("Loading weights", done, total),
        bits,
        device,
    )
    most = model.context_length if sizes is None else sizes.max_positions
    decoder = Decoder(model, weights, kernels, most, dtype)
    if sizes is None:
        left = memory_for_pool(
            decoder,
            kernels,
            spec,
            rules,
            limits.max_batch_tokens,
            limits.max_batch_size,
            config.gpu_memory_utilization,
            fuses=config.fuse_after is not None,
        )
        sizes = PoolSizes.of(left, spec, limits.max_batch_size, config)
    layout = checkpoint_layout(checkpoint, dtype)
    loader = make_loader(layout, dtype, config.adapter_bits)
    host = HostStore(loader, config.host_adapter_bytes, pin=device.type == "cuda")
    runner = Runner(
        decoder,
        kernels,
        sizes.num_pages,
        spec,
        host,
        config.fuse_after,
        sizes.max_positions,
        limits.steps_ahead,
        rules,
        limits.max_batch_size,
    )
    runner.record_ahead(
        min(limits.max_batch_size, limits.max_batch_tokens),
        lambda done, total: report("Recording decode steps", done, total),
    )

    wake, costs = threading.Event(), CostModel()
    pools = Pools.of(sizes.num_pages, config.adapter_share)
    residency = Residency(
        pools.adapters,
        spec.page_bytes,
        spec.block_size,
        host,
        runner.bind_adapter,
        costs,
        wake.set,
        AdapterUsage(config.named_adapters),
    )
    prefix_caching = config.prefix_caching
    host_kv = distant = None
    if config.host_kv_bytes:
        reads_host = isinstance(setup.selection, InfLLM)
        host_kv = runner.host_kv(config.host_kv_bytes, costs.observe_swap, reads_host)
        distant = DistantPages(host_kv, sizes.num_pages) if reads_host else None
    kv = KVCache(
        pools.kv, spec.block_size, costs, prefix_caching, residency.is_doomed, rules, distant
    )
    preemption = Preemption() if host_kv is None else Swapping(kv, costs, host_kv)
    scheduler = Scheduler(
        SchedulerLimits(
            limits.max_batch_tokens,
            limits.max_batch_size,
            sizes.max_positions,
            QueueLimits(config.ttft_slo, config.max_waiting, config.max_waiting_tokens),
        ),
        POLICIES[config.scheduling_policy](),
        pools,
        kv,
        residency,
        preemption,
    )
    return Engine(
        checkpoint.id,
        checkpoint.tokenizer,
        sizes.max_model_len,
        model.context_length,
        model.vocab_size,
        layout,
        scheduler,
        AdapterControl(pools, kv, residency, scheduler),
        runner,
        StatsRecorder(pools, kv, residency, costs, loader.times),
        wake,
        host.close,
        config.check_integrity,
        setup,
    )


def weight_bits(quantization: str | None) -> int | None:
    """Raises ModelError for a quantisation that there is not."""
    bits = {None: None, "int8": 8, "int4": 4}
    if quantization not in bits:
        raise ModelError(f"quantization {quantization!r} is not supported: use int8 or int4.")
    return bits[quantization]
