"""The catalog's tables, and the way between a row and a record."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import JSON, BigInteger, ColumnElement, String, or_
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column

from polydelta.adapters_store.id_globs import beginning
from polydelta.adapters_store.records import (
    AdapterFacts,
    AdapterRecord,
    Part,
    Source,
    VersionState,
)

# Changes with the tables; a database that was made by another one is not touched.
SCHEMA = 1

# In the order of code points, as Python sorts, whatever the database's language.
_ID = String(128).with_variant(String(128, collation="C"), "postgresql")

SCHEMA_TABLE = "polydelta_schema"

# Sorts after every character that an id may have.
_LAST = "~"


class Base(DeclarativeBase):
    pass


class SchemaRow(Base):
    __tablename__ = SCHEMA_TABLE

    number: Mapped[int] = mapped_column(primary_key=True)


class AdapterRow(Base):
    """Stays when the versions go: a version number is never given twice."""

    __tablename__ = "polydelta_adapters"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    last_version: Mapped[int]


class VersionRow(Base):
    __tablename__ = "polydelta_versions"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    format: Mapped[str] = mapped_column(String(32))
    kinds: Mapped[list[str]] = mapped_column(JSON)
    rank: Mapped[int]
    modules: Mapped[int]
    nbytes: Mapped[int] = mapped_column(BigInteger)
    base: Mapped[str] = mapped_column(String(64))
    created: Mapped[float]
    source: Mapped[str] = mapped_column(String(16))
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16), index=True)
    pinned: Mapped[bool]
    uses: Mapped[int] = mapped_column(BigInteger)
    last_used: Mapped[float | None]
    parts: Mapped[list[dict[str, Any]]] = mapped_column(JSON)

    def record(self) -> AdapterRecord:
        return AdapterRecord(
            id=self.id,
            version=self.version,
            digest=self.digest,
            facts=AdapterFacts(
                self.format, tuple(self.kinds), self.rank, self.modules, self.nbytes
            ),
            base=self.base,
            created=self.created,
            source=Source(self.source),
            labels=self.labels,
            state=VersionState(self.state),
            pinned=self.pinned,
            uses=self.uses,
            last_used=self.last_used,
            parts=tuple(Part(**part) for part in self.parts),
        )


def within(column: InstrumentedAttribute[str], globs: Iterable[str]) -> ColumnElement[bool]:
    """Rows of ids that match one of the globs, as far as an index finds them: those of a glob that
    is not simple come with others that begin like it."""
    return or_(False, *(_begins(column, glob) for glob in globs))


def _begins(column: InstrumentedAttribute[str], glob: str) -> ColumnElement[bool]:
    first = beginning(glob)
    if first == glob:
        return column == glob
    return (column >= first) & (column < first + _LAST)


def to_row(record: AdapterRecord) -> VersionRow:
    """The row of a version; a time of 0 is now."""
    facts = record.facts
    return VersionRow(
        id=record.id,
        version=record.version,
        digest=record.digest,
        format=facts.format,
        kinds=list(facts.kinds),
        rank=facts.rank,
        modules=facts.modules,
        nbytes=facts.nbytes,
        base=record.base,
        created=record.created or time.time(),
        source=record.source.value,
        labels=dict(record.labels),
        state=record.state.value,
        pinned=record.pinned,
        uses=record.uses,
        last_used=record.last_used,
        parts=[asdict(part) for part in record.parts],
    )
