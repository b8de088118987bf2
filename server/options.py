"""Command-line options that stand for settings: help and default come from the field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from pydantic_core import PydanticUndefined

from polydelta.server.settings import ServerSettings

MODEL = "Model and adapters"
STORE = "Uploaded adapters"
MEMORY = "Memory and batching"
KV = "KV cache"
PRESSURE = "When there is too much to do"
HTTP = "HTTP"


def setting(name: str, flags: str, panel: str, metavar: str | None = None) -> Any:
    """The option of one setting. Not given, it leaves the choice to the environment."""
    field = ServerSettings.model_fields[name]
    text = str(field.description)
    if field.default not in (None, (), PydanticUndefined):
        text += f" [dim]\\[default: {_shown(field.default)}][/dim]"
    return typer.Option(flags, help=text, metavar=metavar, rich_help_panel=panel)


def as_options(message: str) -> str:
    """Names of settings as they are written on the command line: those that are no word besides,
    and no part of a path."""

    def option(name: re.Match[str]) -> str:
        is_setting = name[0] in ServerSettings.model_fields
        return f"--{name[0].replace('_', '-')}" if is_setting else name[0]

    names = r"[a-z]+(?:_[a-z]+)+|prefill(?= (?:full|xattention))"
    return re.sub(rf"(?<![\w/.\\-])(?:{names})(?![\w/\\-]|\.\w)", option, message)


def _shown(default: object) -> str:
    if isinstance(default, ByteSize):
        return default.human_readable()
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


Model = Annotated[str | None, setting("model", "--model", MODEL, "PATH|HUB_ID")]
ServedModelName = Annotated[str | None, setting("served_model_name", "--served-model-name", MODEL)]
Adapters = Annotated[list[Path] | None, setting("adapters", "--adapters", MODEL, "DIR")]
Device = Annotated[str | None, setting("device", "--device", MODEL, "auto|cpu|cuda")]
Dtype = Annotated[str | None, setting("dtype", "--dtype", MODEL, "NAME")]
Quantization = Annotated[str | None, setting("quantization", "--quantization", MODEL, "int8|int4")]
MaxModelLen = Annotated[int | None, setting("max_model_len", "--max-model-len", MODEL)]

Store = Annotated[Path | None, setting("store", "--store", STORE, "DIR")]
Storage = Annotated[str | None, setting("storage", "--storage", STORE, "URL")]
Catalog = Annotated[str | None, setting("catalog", "--catalog", STORE, "URL")]
StoreQuota = Annotated[str | None, setting("store_quota", "--store-quota", STORE, "SIZE")]
PackedCache = Annotated[str | None, setting("packed_cache", "--packed-cache", STORE, "SIZE")]
MaxUpload = Annotated[str | None, setting("max_upload", "--max-upload", STORE, "SIZE")]
MaxAdapterRank = Annotated[int | None, setting("max_adapter_rank", "--max-adapter-rank", STORE)]
AdapterRoot = Annotated[list[Path] | None, setting("adapter_root", "--adapter-root", STORE, "DIR")]

Pool = Annotated[str | None, setting("pool", "--pool", MEMORY, "SIZE|split:SHARE")]
GpuMemoryUtilization = Annotated[
    float | None, setting("gpu_memory_utilization", "--gpu-memory-utilization", MODEL, "SHARE")
]
AdapterBits = Annotated[int | None, setting("adapter_bits", "--adapter-bits", MEMORY, "8|4")]
HostAdapterRam = Annotated[
    str | None, setting("host_adapter_ram", "--host-adapter-ram", MEMORY, "SIZE")
]
MaxBatchTokens = Annotated[int | None, setting("max_batch_tokens", "--max-batch-tokens", MEMORY)]
MaxBatchSize = Annotated[int | None, setting("max_batch_size", "--max-batch-size", MEMORY)]
BlockSize = Annotated[int | None, setting("block_size", "--block-size", MEMORY)]
KvFormat = Annotated[str | None, setting("kv_format", "--kv-format", KV, "NAME")]
KvSelect = Annotated[str | None, setting("kv_select", "--kv-select", KV, "NAME[:NUMBERS]")]
Prefill = Annotated[str | None, setting("prefill", "--prefill", KV, "NAME[:NUMBERS]")]
KvLabels = Annotated[Path | None, setting("kv_labels", "--kv-labels", KV, "FILE")]
PrefixCaching = Annotated[
    bool | None,
    setting("prefix_caching", "--prefix-caching/--no-prefix-caching", MEMORY),
]

FuseAfter = Annotated[int | None, setting("fuse_after", "--fuse-after", MEMORY, "STEPS")]
CheckIntegrity = Annotated[
    bool | None, setting("check_integrity", "--check-integrity/--no-check-integrity", MEMORY)
]

SchedulingPolicy = Annotated[
    str | None,
    setting("scheduling_policy", "--scheduling-policy", PRESSURE, "fair|fcfs|priority"),
]
TtftSlo = Annotated[float | None, setting("ttft_slo", "--ttft-slo", PRESSURE, "SECONDS")]
MaxWaiting = Annotated[int | None, setting("max_waiting", "--max-waiting", PRESSURE)]
MaxWaitingTokens = Annotated[
    int | None, setting("max_waiting_tokens", "--max-waiting-tokens", PRESSURE)
]
HostKvGib = Annotated[float | None, setting("host_kv_gib", "--host-kv-gib", PRESSURE, "GIB")]

Host = Annotated[str | None, setting("host", "--host", HTTP)]
Port = Annotated[int | None, setting("port", "--port", HTTP)]
ApiKey = Annotated[list[str] | None, setting("api_key", "--api-key", HTTP, "KEY")]
Tenants = Annotated[Path | None, setting("tenants", "--tenants", HTTP, "FILE")]
ShutdownTimeout = Annotated[float | None, setting("shutdown_timeout", "--shutdown-timeout", HTTP)]
LogLevel = Annotated[
    str | None, setting("log_level", "--log-level", HTTP, "debug|info|warning|error")
]
MetricsAdapters = Annotated[int | None, setting("metrics_adapters", "--metrics-adapters", HTTP)]
OtlpTracesEndpoint = Annotated[
    str | None, setting("otlp_traces_endpoint", "--otlp-traces-endpoint", HTTP, "URL")
]
