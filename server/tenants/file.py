"""The tenants as an operator writes them down: one table for each, in TOML or JSON.

    [acme]
    keys = ["sk-..."]              # or "env:ACME_KEY", a variable that has it; or "sha256:<hex>"
    adapters = ["acme-*", "shared-*"]
    uploads = ["acme-*"]
    upload_quota = "2GiB"
    tokens_per_minute = 60000
    max_concurrent = 8
    weight = 2.0
    priority = 0
    private_cache = false

All but `keys` may be left out. What cannot be used is refused by name, and no message has a key.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from polydelta.adapters_store.reference import is_id
from polydelta.server.openai.schemas import PRIORITY_LIMIT
from polydelta.server.tenants.tenant import Tenant, digest_of

FROM_ENVIRONMENT = "env:"
FROM_DIGEST = "sha256:"
# Text with one of these is no path, but the tables themselves; there are none without a list.
_TABLES = "[{"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# Letters of adapter ids, with *, ? and [...] among them.
_GLOB = re.compile(r"([A-Za-z0-9._*?-]|\[!?[A-Za-z0-9._-]+\])+")


def parse_tenants(value: object) -> object:
    """A path to the tables, or as text the tables themselves -> tenants. Raises ValueError."""
    if not isinstance(value, str | Path):
        return value
    if isinstance(value, Path) or not any(mark in value for mark in _TABLES):
        value = _read(Path(value))
    tables = _parse(value)
    if not tables:
        raise ValueError("there is no tenant in it; write a table for each, such as [acme]")
    tenants = tuple(_tenant(name, table) for name, table in tables.items())
    _check_keys(tenants)
    return tenants


def check_against_operators(
    tenants: tuple[Tenant, ...], info: ValidationInfo
) -> tuple[Tenant, ...]:
    """The tenants. Raises ValueError where a key of the setting `api_key` is a tenant's as well."""
    keys: Sequence[SecretStr] = info.data.get("api_key", ())
    operators = {digest_of(key.get_secret_value().encode()) for key in keys}
    for tenant in tenants:
        if not operators.isdisjoint(tenant.key_digests):
            raise ValueError(f"[{tenant.name}] keys: one is a key of --api-key as well")
    return tenants


TenantsSetting = Annotated[
    tuple[Tenant, ...], BeforeValidator(parse_tenants), AfterValidator(check_against_operators)
]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(
            f"cannot read {str(path)!r}: {reason}; it must be a file with a table for each tenant"
        ) from None


def _parse(text: str) -> Mapping[str, Any]:
    """The syntax errors of both parsers say where, and do not quote."""
    try:
        if text.lstrip().startswith("{"):
            tables: Any = json.loads(text, object_pairs_hook=_once)
        else:
            tables = tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"it is neither TOML nor JSON: {error}") from None
    return dict(tables)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice; the last one would win in silence."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in members if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return members


def _check_glob(glob: str) -> str:
    if not _GLOB.fullmatch(glob):
        raise ValueError(f"{glob!r} matches no adapter id; write one, or a glob such as acme-*")
    return glob


def _parse_size(value: object) -> object:
    """pydantic itself takes True and 1.5 for sizes as well."""
    try:
        if type(value) in (int, str):
            return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        pass
    raise ValueError(f"{value!r} is no size; write 512MiB or 2GiB")


Glob = Annotated[str, AfterValidator(_check_glob)]
Size = Annotated[int, BeforeValidator(_parse_size), Field(gt=0)]


class _Table(BaseModel):
    """One tenant's settings, as they are written."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    keys: list[str] = Field(min_length=1)
    adapters: list[Glob] = Field(default_factory=list)
    uploads: list[Glob] = Field(default_factory=list)
    upload_quota: Size | None = None
    tokens_per_minute: int | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)
    priority: int = Field(0, ge=-PRIORITY_LIMIT - 1, le=PRIORITY_LIMIT)
    private_cache: bool = False

    @model_validator(mode="after")
    def no_quota_without_uploads(self) -> _Table:
        if self.upload_quota is not None and not self.uploads:
            raise ValueError("upload_quota: only goes with uploads; write which ids it may upload")
        return self


def _tenant(name: str, table: object) -> Tenant:
    if not is_id(name):
        raise ValueError(
            f"{name[:80]!r} is no name for a tenant: use 1 to 128 letters, digits, dots, hyphens "
            "and underscores, a letter or digit first"
        )
    try:
        known = _Table.model_validate(table)
    except ValidationError as error:
        raise ValueError(f"[{name}] {_explain(error)}") from None
    return Tenant(
        name=name,
        key_digests=tuple(_key_digest(name, key) for key in known.keys),
        adapters=tuple(known.adapters),
        uploads=tuple(known.uploads),
        upload_quota=known.upload_quota,
        tokens_per_minute=known.tokens_per_minute,
        max_concurrent=known.max_concurrent,
        weight=known.weight,
        priority=known.priority,
        private_cache=known.private_cache,
    )


def _explain(error: ValidationError) -> str:
    """The first problem, without what was written: it may be a key."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: there is no such setting; there are {', '.join(_Table.model_fields)}"
        case "missing":
            return f"{where}: write at least one"
        case "model_type" | "model_attributes_type":
            return "must be a table of settings, such as keys and adapters"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def _key_digest(tenant: str, written: str) -> bytes:
    """Of a key, of the variable that has it, or as it stands there. Raises ValueError."""
    if written.startswith(FROM_DIGEST):
        text = written.removeprefix(FROM_DIGEST)
        if not _DIGEST.fullmatch(text):
            raise ValueError(f"[{tenant}] keys: what follows sha256: must be 64 hex digits")
        digest = bytes.fromhex(text)
        if digest == digest_of(b""):
            raise ValueError(f"[{tenant}] keys: one is the sha256 of an empty key")
        return digest
    whose = f"[{tenant}] keys: one"
    key = written
    if written.startswith(FROM_ENVIRONMENT):
        variable = written.removeprefix(FROM_ENVIRONMENT)
        whose = f"[{tenant}] keys: that of the variable {variable!r}"
        if variable not in os.environ:
            raise ValueError(f"[{tenant}] keys: the variable {variable!r} is not set")
        key = os.environ[variable]
    if not key.strip():
        raise ValueError(f"{whose} is empty")
    if key != key.strip():
        raise ValueError(f"{whose} has spaces around it, which no client can send")
    return digest_of(key.encode())


def _check_keys(tenants: Iterable[Tenant]) -> None:
    """A key says who asks, so it is one tenant's only."""
    owners: dict[bytes, str] = {}
    for tenant in tenants:
        for digest in tenant.key_digests:
            owner = owners.setdefault(digest, tenant.name)
            if owner != tenant.name:
                raise ValueError(f"[{tenant.name}] keys: one is a key of [{owner}] as well")
        if len(set(tenant.key_digests)) < len(tenant.key_digests):
            raise ValueError(f"[{tenant.name}] keys: one stands there twice")
