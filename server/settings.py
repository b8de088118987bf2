"""What an operator may set: by option on the command line, or by environment variable.

Each setting is written once, here; the command line takes its help and its default from the field.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_data_path
from pydantic import AnyHttpUrl, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from polydelta.engine.config import EngineConfig
from polydelta.server.kv_settings import KVSettings
from polydelta.server.pool_spec import PoolSetting
from polydelta.server.tenants.file import TenantsSetting

ENV_PREFIX = "POLYDELTA_"


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and says why."""


def packaged_samples() -> tuple[Path, ...]:
    """The folder of the sample adapters that come with the package."""
    folder = Path(str(resources.files("polydelta.adapters_store"))) / "samples"
    return (folder,) if folder.is_dir() else ()


class ServerSettings(KVSettings):
    """All settings of a server, checked."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    model: str | None = Field(
        None,
        description="Folder, GGUF file or hub id of the base model; without it, the default model.",
    )
    served_model_name: str | None = Field(
        None, min_length=1, description="What clients call the base model; its own name without it."
    )
    adapters: Annotated[tuple[Path, ...], NoDecode] = Field(
        default_factory=packaged_samples,
        description="Folder of adapters, one in each subfolder; may be given several times."
        " Without it, the samples that come with the package.",
    )
    store: Path = Field(
        default_factory=lambda: user_data_path("polydelta", appauthor=False) / "store",
        description="Folder of uploaded adapters and their catalog; made if it is not there."
        " Without it, one in your user data folder.",
    )
    storage: str | None = Field(
        None,
        min_length=1,
        description="Where uploaded files lie instead, such as s3://bucket/adapters; the store's"
        " folder is their cache then.",
    )
    catalog: SecretStr | None = Field(
        None,
        min_length=1,
        description="Database of the catalog, such as postgresql+psycopg://user@host/name; without"
        " it, a file in the store's folder.",
    )
    store_quota: ByteSize = Field(
        ByteSize(64 << 30), gt=0, description="Most that all uploaded files take together."
    )
    packed_cache: ByteSize = Field(
        ByteSize(64 << 30),
        gt=0,
        description="Most that adapters take on disk in the form in which they are loaded.",
    )
    max_upload: ByteSize = Field(
        ByteSize(2 << 30), gt=0, description="Largest upload, as sent and as unpacked."
    )
    max_adapter_rank: int = Field(1024, gt=0, description="Largest rank that an upload may have.")
    adapter_root: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folder below which clients may name adapters by path; may be given several"
        " times. Those of --adapters always are.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto takes a GPU where there is one."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Number format of weights, and of KV cache that is native: bfloat16, float32,"
        " or, on a GPU, float16.",
    )
    quantization: Literal["int8", "int4"] | None = Field(
        None,
        description="Bits of the linear layers' weights, at most: the codes of a GGUF file (Q8_0,"
        " Q4_0, Q4_1) are kept, other weights are rounded. Adapters are not. The output layer has 8"
        " bits. Needs bfloat16 and a CPU with AVX512-BF16; not with --fuse-after. Without it, the"
        " dtype's.",
    )
    max_model_len: int | None = Field(
        None,
        gt=0,
        description="Longest prompt plus output, in tokens. Without it, the model's own, or half of"
        " what the pool holds where that is less.",
    )
    max_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens computed in one step. Without it, 512 on a CPU, 8192 on a GPU.",
    )
    max_batch_size: int | None = Field(
        None,
        gt=0,
        description="Sequences that run at the same time. Without it, 64 on a CPU, 256 on a GPU.",
    )
    block_size: int | None = Field(
        None,
        gt=0,
        description="Tokens of KV cache in one page, as --kv-format native has them; smaller ones"
        " have more in as many bytes. Without it, 16; 64 for Mustafar's formats; 8 with"
        " --kv-select quest.",
    )
    pool: Annotated[PoolSetting, NoDecode] | None = Field(
        None,
        description="Memory that KV cache and resident adapters share, such as 512MiB or 2GiB."
        " Without it, 2GiB on a CPU, and on a GPU what --gpu-memory-utilization leaves."
        " split:0.5, or 2GiB,split:0.5, keeps half of it for adapters alone: for comparison.",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory that the server takes: weights, the largest step"
        " (measured at start), and the pool.",
    )
    adapter_bits: Literal[8, 4] | None = Field(
        None,
        description="Bits of the low-rank matrices of adapters in the pool, 8 or 4: it holds up to"
        " two or four times as many. All adapters are rounded to them; what an adapter changes"
        " besides stays in the dtype. Without it, the dtype's.",
    )
    host_adapter_ram: ByteSize = Field(
        ByteSize(2 << 30), gt=0, description="Host memory for adapters that are kept ready."
    )
    prefix_caching: bool = Field(True, description="Reuse the KV cache of shared prompt starts.")
    scheduling_policy: Literal["fair", "fcfs", "priority"] = Field(
        "fair",
        description="Who of those that wait enters next: fair shares tokens between tenants, or"
        " adapters where there are no tenants; fcfs goes by arrival; priority by the field"
        " priority of requests, lower numbers first.",
    )
    ttft_slo: float | None = Field(
        None,
        gt=0,
        description="Seconds from a request to its first token. One that cannot keep them is"
        " refused at once, with status 429. Without it, none is.",
    )
    max_waiting: int | None = Field(
        None,
        gt=0,
        description="Requests that may wait for others; more are refused with status 503. Without"
        " it, any number may.",
    )
    max_waiting_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens that the prompts of waiting requests may have together; more are"
        " refused with status 503. Without it, any number.",
    )
    host_kv_gib: float = Field(
        0.0,
        ge=0,
        description="Host memory in GiB for the KV cache of requests that are preempted, so that"
        " it is copied back instead of computed again, where that is faster; and for what infllm"
        " rarely reads.",
    )
    fuse_after: int | None = Field(
        None,
        ge=0,
        description="Steps in which all requests use one adapter before it is written into the base"
        " weights, and taken out when another comes. Without it, never.",
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Key that /v1 asks for; may be given several times. Without it, none."
    )
    # Checked after `api_key`: no key may be in both.
    tenants: Annotated[TenantsSetting, NoDecode] = Field(
        (),
        description="File of tenants, in TOML or JSON: their keys, and what each may use, change"
        " and take. The keys of --api-key are operators' then, and /metrics asks for one. Without"
        " it, whoever may ask may do everything.",
    )
    shutdown_timeout: float = Field(
        0.0,
        ge=0,
        description="Seconds that a stop gives requests to finish; what is left is aborted.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="How much is logged; info has a line for each request."
    )
    check_integrity: bool = Field(
        False,
        description="Balance the pool's books whenever the engine goes idle; for tests and debug"
        " runs.",
    )
    metrics_adapters: int = Field(
        100,
        ge=0,
        description="Adapters that /metrics tells of by name, the busiest; all others are in"
        " one series, named other.",
    )
    otlp_traces_endpoint: AnyHttpUrl | None = Field(
        None,
        description="OpenTelemetry collector that traces of requests are sent to, such as"
        " http://localhost:4318/v1/traces; needs the extra named tracing. Without it, none.",
    )

    @field_validator("adapters", "adapter_root", mode="before")
    @classmethod
    def split_paths(cls, value: object) -> object:
        """The environment holds several folders the way PATH does."""
        return value.split(os.pathsep) if isinstance(value, str) else value

    @field_validator("adapters", "adapter_root")
    @classmethod
    def folders_exist(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in value:
            if not path.is_dir():
                raise ValueError(f"{str(path)!r} is not a folder")
        return value

    @field_validator("adapter_bits", mode="before")
    @classmethod
    def read_bits(cls, value: object) -> object:
        """The environment holds text."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("api_key", mode="before")
    @classmethod
    def split_keys(cls, value: object) -> object:
        """The environment holds several keys with commas between them."""
        return value.split(",") if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def keys_are_not_empty(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value().strip() for key in value):
            raise ValueError("a key is empty")
        return value

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_size=self.max_batch_size,
            block_size=self.block_size,
            kv_format=self.kv_format,
            kv_select=self.kv_select,
            prefill=self.prefill,
            kv_labels=self.kv_labels,
            pool_bytes=None if self.pool is None else self.pool.nbytes,
            adapter_share=None if self.pool is None else self.pool.adapter_share,
            scheduling_policy=self.scheduling_policy,
            ttft_slo=self.ttft_slo,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            host_kv_bytes=round(self.host_kv_gib * 2**30),
            gpu_memory_utilization=self.gpu_memory_utilization,
            adapter_bits=self.adapter_bits,
            host_adapter_bytes=int(self.host_adapter_ram),
            prefix_caching=self.prefix_caching,
            quantization=self.quantization,
            fuse_after=self.fuse_after,
            check_integrity=self.check_integrity,
            named_adapters=self.metrics_adapters,
        )


def env_name(setting: str) -> str:
    return f"{ENV_PREFIX}{setting.upper()}"


def load_settings(**options: Any) -> ServerSettings:
    """Settings from options (None: not given), then the environment, then defaults.

    Raises SettingsError naming the option and the variable of the first setting that is wrong.
    """
    try:
        return ServerSettings(**{name: v for name, v in options.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        setting = str(problem["loc"][0])
        reason = problem["msg"].removeprefix("Value error, ")
        option = f"--{setting.replace('_', '-')}"
        raise SettingsError(f"{option} (or {env_name(setting)}): {reason}") from None
