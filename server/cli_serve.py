"""`polydelta serve`."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import ByteSize
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from polydelta.server import options
from polydelta.server.app import create_app
from polydelta.server.lifecycle import Lifecycle
from polydelta.server.loading import load_engine
from polydelta.server.loading_door import LoadingDoor
from polydelta.server.open_files import raise_open_files_limit
from polydelta.server.serving import Server, bind, leave, url_of
from polydelta.server.settings import ServerSettings, load_settings
from polydelta.server.stores import disk_tier, make_publisher, open_store, pin_again
from polydelta.server.tracing import open_tracer

if TYPE_CHECKING:  # the store imports torch, which takes seconds
    from polydelta.adapters_store.store import AdapterStore
    from polydelta.engine.engine import Engine

# A catalog can hold tens of thousands of folders; the banner counts no further than this.
COUNTED_ADAPTERS = 1000
NAMED_ADAPTERS = 4


def serve(
    model: options.Model = None,
    adapters: options.Adapters = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    served_model_name: options.ServedModelName = None,
    max_model_len: options.MaxModelLen = None,
    store: options.Store = None,
    storage: options.Storage = None,
    catalog: options.Catalog = None,
    store_quota: options.StoreQuota = None,
    packed_cache: options.PackedCache = None,
    max_upload: options.MaxUpload = None,
    max_adapter_rank: options.MaxAdapterRank = None,
    adapter_root: options.AdapterRoot = None,
    pool: options.Pool = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    adapter_bits: options.AdapterBits = None,
    host_adapter_ram: options.HostAdapterRam = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_batch_size: options.MaxBatchSize = None,
    block_size: options.BlockSize = None,
    kv_format: options.KvFormat = None,
    kv_select: options.KvSelect = None,
    prefill: options.Prefill = None,
    kv_labels: options.KvLabels = None,
    prefix_caching: options.PrefixCaching = None,
    fuse_after: options.FuseAfter = None,
    scheduling_policy: options.SchedulingPolicy = None,
    ttft_slo: options.TtftSlo = None,
    max_waiting: options.MaxWaiting = None,
    max_waiting_tokens: options.MaxWaitingTokens = None,
    host_kv_gib: options.HostKvGib = None,
    check_integrity: options.CheckIntegrity = None,
    host: options.Host = None,
    port: options.Port = None,
    api_key: options.ApiKey = None,
    tenants: options.Tenants = None,
    shutdown_timeout: options.ShutdownTimeout = None,
    log_level: options.LogLevel = None,
    metrics_adapters: options.MetricsAdapters = None,
    otlp_traces_endpoint: options.OtlpTracesEndpoint = None,
) -> None:
    """Serve one base model and all its adapters over an OpenAI-style HTTP API.

    Clients choose by the `model` field: the base model's name, an adapter's id, or `id@version`.
    Every option has an environment variable, such as POLYDELTA_MAX_BATCH_SIZE for
    --max-batch-size; the command line wins.

    [bold]Examples[/bold]

    [cyan]polydelta serve[/cyan]
    the default model with the sample adapters that come along

    [cyan]polydelta serve --model ./my-model --adapters ./adapters --port 9000[/cyan]
    a folder of your own, with your own adapters

    [cyan]polydelta serve --store ./store --api-key SECRET[/cyan]
    adapters that clients upload, in a folder of your choice

    [cyan]polydelta serve --pool 512MiB --max-model-len 2048[/cyan]
    on a machine with little memory

    [cyan]polydelta serve --kv-format int8 --kv-select quest:1024[/cyan]
    twice the context in the same pool, of which answers read 1,024 tokens at a time
    """
    settings = load_settings(
        model=model,
        adapters=adapters,
        device=device,
        dtype=dtype,
        quantization=quantization,
        served_model_name=served_model_name,
        max_model_len=max_model_len,
        store=store,
        storage=storage,
        catalog=catalog,
        store_quota=store_quota,
        packed_cache=packed_cache,
        max_upload=max_upload,
        max_adapter_rank=max_adapter_rank,
        adapter_root=adapter_root,
        pool=pool,
        gpu_memory_utilization=gpu_memory_utilization,
        adapter_bits=adapter_bits,
        host_adapter_ram=host_adapter_ram,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        block_size=block_size,
        kv_format=kv_format,
        kv_select=kv_select,
        prefill=prefill,
        kv_labels=kv_labels,
        prefix_caching=prefix_caching,
        fuse_after=fuse_after,
        scheduling_policy=scheduling_policy,
        ttft_slo=ttft_slo,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        host_kv_gib=host_kv_gib,
        check_integrity=check_integrity,
        host=host,
        port=port,
        api_key=api_key,
        tenants=tenants,
        shutdown_timeout=shutdown_timeout,
        log_level=log_level,
        metrics_adapters=metrics_adapters,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    console = Console(stderr=True)
    lifecycle = Lifecycle()
    raise_open_files_limit()
    with (
        open_tracer(settings.otlp_traces_endpoint) as tracer,
        bind(settings.host, settings.port) as bound,
        LoadingDoor(bound, lifecycle) as door,
        closing(open_store(settings)) as opened,
    ):
        # The engine and uploads share one.
        make_tier = disk_tier(opened, settings)
        engine = load_engine(settings, console, make_tier, lifecycle.report)
        publisher = make_publisher(opened, engine, settings, make_tier)
        base_name = settings.served_model_name or engine.model_id

        def on_ready() -> None:
            pin_again(opened, engine)
            print_banner(console, url_of(bound), base_name, opened, engine, settings)

        app = create_app(engine, opened, publisher, settings, lifecycle)
        if tracer is not None:
            tracer.install(app)
        door.close()
        Server(app, engine, settings, lifecycle, on_ready).serve_until_stopped(bound)
    leave()


def print_banner(
    console: Console,
    url: str,
    base_name: str,
    store: AdapterStore,
    engine: Engine,
    settings: ServerSettings,
) -> None:
    """What is served and where, and one call that can be pasted."""
    found = list(islice(store.ids(), COUNTED_ADAPTERS))
    count = f"{len(found)} or more" if len(found) == COUNTED_ADAPTERS else str(len(found))
    names = ", ".join(found[:NAMED_ADAPTERS]) + (", ..." if len(found) > NAMED_ADAPTERS else "")
    facts = Table.grid(padding=(0, 2))
    formats = filter(None, (settings.dtype, settings.quantization))
    facts.add_row("model", escape(f"{base_name} ({', '.join(formats)})"))
    bits = f", {settings.adapter_bits} bits in the pool" if settings.adapter_bits else ""
    facts.add_row("adapters", f"{count} ({names}){bits}" if found else f"none{bits}")
    facts.add_row("uploads", escape(str(settings.store)))
    facts.add_row("device", engine.device)
    facts.add_row("pool", ByteSize(engine.pool_bytes).human_readable())
    kept = [settings.kv_format, str(engine.kv_setup.selection)]
    if settings.prefill != "full":
        kept.append(f"prefill {engine.kv_setup.prefill}")
    room = f"room for {engine.stats().kv_tokens:,} tokens"
    facts.add_row("KV cache", f"{', '.join(kept)}: {room}")
    facts.add_row("context", _context(engine, settings))
    facts.add_row("docs", f"{url}/docs")
    console.print(Panel(facts, title=f"PolyDelta at {url}", expand=False))
    body = json.dumps({"model": base_name, "prompt": "Once upon a time"})
    call = f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    console.print(call, markup=False, highlight=False, soft_wrap=True)


def _context(engine: Engine, settings: ServerSettings) -> str:
    served = f"{engine.max_model_len:,} tokens at most"
    if settings.max_model_len is not None or engine.max_model_len == engine.context_length:
        return served
    return f"{served}, half of what the pool holds (the model's: {engine.context_length:,})"
