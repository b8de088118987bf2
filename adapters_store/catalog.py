"""The catalog of uploaded versions: one row each, in SQLite or PostgreSQL."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Engine,
    Select,
    String,
    case,
    create_engine,
    delete,
    event,
    func,
    select,
    update,
)
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from polydelta.adapters_store.errors import StoreError, UnknownAdapterError
from polydelta.adapters_store.records import (
    AdapterFacts,
    AdapterRecord,
    Part,
    Source,
    VersionState,
)

logger = logging.getLogger(__name__)

# Changes with the tables; a database that was made by another one is not touched.
SCHEMA = 1

# In the order of code points, as Python sorts, whatever the database's language.
_ID = String(128).with_variant(String(128, collation="C"), "postgresql")

_SCHEMA = "polydelta_schema"


class _Base(DeclarativeBase):
    pass


class _Schema(_Base):
    __tablename__ = _SCHEMA

    number: Mapped[int] = mapped_column(primary_key=True)


class _Adapter(_Base):
    """Stays when the versions go: a version number is never given twice."""

    __tablename__ = "polydelta_adapters"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    last_version: Mapped[int]


class _Version(_Base):
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


class Catalog:
    """Rows of versions. Threads may share it; so may processes, where the database allows it.

    Every method raises StoreError when the database cannot be reached.
    """

    def __init__(self, url: str | URL) -> None:
        """url: as SQLAlchemy has it, such as `sqlite:////path/catalog.db` or
        `postgresql+psycopg://user:password@host/database`. Makes the tables if there are none."""
        self._engine = _connect(url)
        try:
            self._make_tables()
        except StoreError:
            self.close()
            raise
        # Also what a driver says of the URL's options.
        except (SQLAlchemyError, TypeError, ValueError) as error:
            self.close()
            reason = _without_secrets(_reason(error), self._engine.url)
            raise StoreError(f"The catalog cannot be opened: {reason}.") from None

    def close(self) -> None:
        self._engine.dispose()

    def add(self, record: AdapterRecord, at_least: int = 1) -> AdapterRecord:
        """Keeps a new version; the record comes back with the number that it was given.

        at_least: the lowest number that may be given.
        """
        for _ in range(16):
            try:
                return self._add(record, at_least)
            except IntegrityError:  # another process was faster with the same number
                continue
        raise StoreError(f"No version number could be had for {record.id!r}: try again.")

    def newest(self, adapter_id: str) -> AdapterRecord | None:
        """The newest ready version."""
        query = (
            select(_Version)
            .where(_Version.id == adapter_id, _Version.state == VersionState.READY.value)
            .order_by(_Version.version.desc())
            .limit(1)
        )
        return next(iter(self._records(query)), None)

    def find(self, adapter_id: str, version: int) -> AdapterRecord | None:
        query = select(_Version).where(_Version.id == adapter_id, _Version.version == version)
        return next(iter(self._records(query)), None)

    def versions(self, adapter_id: str) -> list[AdapterRecord]:
        """All versions, oldest first."""
        return self._records(
            select(_Version).where(_Version.id == adapter_id).order_by(_Version.version)
        )

    def knows(self, adapter_id: str) -> bool:
        """Whether the id was ever given a version here, gone ones included."""
        with self._session() as session:
            return session.get(_Adapter, adapter_id) is not None

    def known(self) -> set[str]:
        """All ids that `knows` knows."""
        with self._session() as session:
            return set(session.scalars(select(_Adapter.id)))

    def ready(self) -> set[str]:
        """Ids that have a ready version."""
        with self._session() as session:
            query = select(_Version.id).where(_Version.state == VersionState.READY.value)
            return set(session.scalars(query.distinct()))

    def page(
        self,
        after: str,
        limit: int,
        labels: Mapping[str, str],
        kind: str | None,
    ) -> list[AdapterRecord]:
        """Newest ready versions by id, those whose id comes after `after`; at most `limit`."""
        newest = (
            select(_Version.id, func.max(_Version.version).label("version"))
            .where(_Version.state == VersionState.READY.value, _Version.id > after)
            .group_by(_Version.id)
            .subquery()
        )
        query = (
            select(_Version)
            .join(newest, (_Version.id == newest.c.id) & (_Version.version == newest.c.version))
            .order_by(_Version.id)
        )
        for key, value in labels.items():
            query = query.where(_Version.labels[key].as_string() == value)
        if kind is None:
            return self._records(query.limit(limit))
        # A version has few kinds; databases differ in how they look into a list.
        return [r for r in self._records(query) if kind in r.facts.kinds][:limit]

    def in_state(self, state: VersionState) -> list[AdapterRecord]:
        return self._records(select(_Version).where(_Version.state == state.value))

    def pinned(self) -> list[AdapterRecord]:
        ready = _Version.state == VersionState.READY.value
        return self._records(select(_Version).where(_Version.pinned, ready))

    def compositions(self) -> list[AdapterRecord]:
        return self._records(select(_Version).where(_Version.source == Source.COMPOSITION.value))

    def digests(self) -> set[str]:
        """Contents that some version has."""
        with self._session() as session:
            return set(session.scalars(select(_Version.digest).distinct()))

    def has_digest(self, digest: str) -> bool:
        with self._session() as session:
            query = select(_Version.id).where(_Version.digest == digest).limit(1)
            return session.scalar(query) is not None

    def total_bytes(self) -> int:
        """Of all contents, each counted once."""
        each = (
            select(func.max(_Version.nbytes).label("nbytes")).group_by(_Version.digest).subquery()
        )
        with self._session() as session:
            return int(session.scalar(select(func.sum(each.c.nbytes))) or 0)

    def change(self, adapter_id: str, version: int, **values: Any) -> AdapterRecord:
        """Sets `state`, `pinned` or `labels`. Raises UnknownAdapterError."""
        gone = UnknownAdapterError(f"There is no adapter '{adapter_id}@{version}' any more.")
        with self._session() as session, session.begin():
            row = session.get(_Version, (adapter_id, version))
            if row is None:
                raise gone
            for name, value in values.items():
                setattr(row, name, value.value if isinstance(value, VersionState) else value)
            try:
                session.flush()
            except StaleDataError:  # deleted since it was read
                raise gone from None
            return row.record()

    def count_uses(self, uses: Iterable[tuple[str, int, int, float]]) -> None:
        """Adds to versions' uses: (id, version, requests, when the latest one began)."""
        with self._session() as session, session.begin():
            # In an order, so that two processes do not wait for each other's rows.
            for adapter_id, version, count, when in sorted(uses):
                session.execute(
                    update(_Version)
                    .where(_Version.id == adapter_id, _Version.version == version)
                    .values(uses=_Version.uses + count, last_used=when)
                )

    def remove(self, adapter_id: str, versions: Sequence[int]) -> None:
        with self._session() as session, session.begin():
            session.execute(
                delete(_Version).where(
                    _Version.id == adapter_id, _Version.version.in_(list(versions))
                )
            )

    def _add(self, record: AdapterRecord, at_least: int) -> AdapterRecord:
        with self._session() as session, session.begin():
            following = _Adapter.last_version + 1
            # Written before it is read, so that others wait here until this one has its number.
            version = session.scalar(
                update(_Adapter)
                .where(_Adapter.id == record.id)
                .values(last_version=case((following > at_least, following), else_=at_least))
                .returning(_Adapter.last_version)
                .execution_options(synchronize_session=False)
            )
            if version is None:
                version = at_least
                session.add(_Adapter(id=record.id, last_version=version))
            added = replace(record, version=version)
            session.add(_row(added))
        return added

    def _records(self, query: Select[Any]) -> list[AdapterRecord]:
        with self._session() as session:
            rows: Iterable[_Version] = session.scalars(query)
            return [row.record() for row in rows]

    def _session(self) -> Session:
        return _CatalogSession(self._engine, expire_on_commit=False)

    def _make_tables(self) -> None:
        for _ in range(8):
            try:
                return self._make_missing_tables()
            except StatementError as error:
                # Another process may make the same ones now; if not, it fails again below.
                if error.statement is None:
                    raise
        return self._make_missing_tables()

    def _make_missing_tables(self) -> None:
        with Session(self._engine) as session, session.begin():
            _Base.metadata.create_all(session.connection(), tables=[_Base.metadata.tables[_SCHEMA]])
            numbers = list(session.scalars(select(_Schema.number)))
            if numbers not in ([], [SCHEMA]):
                raise StoreError(
                    "The catalog was made by another version of PolyDelta (schema "
                    f"{numbers[-1]}, this one reads {SCHEMA}): use that version, or another "
                    "catalog."
                )
            _Base.metadata.create_all(session.connection())
            if not numbers:
                session.add(_Schema(number=SCHEMA))


class _CatalogSession(Session):
    """Turns what a database raises into what this package raises."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, SQLAlchemyError) and not isinstance(error, IntegrityError):
            # A driver names the host and the user, which are no client's business.
            logger.error("the catalog does not answer: %s", _reason(error))
            raise StoreError("The catalog does not answer; see the server's log.") from error


def _row(record: AdapterRecord) -> _Version:
    facts = record.facts
    return _Version(
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


def _connect(url: str | URL) -> Engine:
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except (NoSuchModuleError, ImportError) as error:
        raise StoreError(
            f"The catalog's URL names a database without a driver here ({error}): write "
            "`postgresql+psycopg://...` and install polydelta[postgres], or leave it out."
        ) from None
    except (ArgumentError, ValueError):
        # What they say of the URL may have a piece of the password in it.
        raise _unreadable_url() from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
    elif isinstance(url, str) and url.partition("://")[2].partition(":")[2].count("@") > 1:
        # A password with a plain @: its end would be taken for the host, which drivers name.
        raise _unreadable_url()
    return engine


def _unreadable_url() -> StoreError:
    return StoreError(
        "The catalog's URL cannot be read: write `sqlite:////path/catalog.db` or "
        "`postgresql+psycopg://user:password@host:port/database`, with %40 for @, %2F for / "
        "and %3A for : in the password."
    )


def _tune_sqlite(connection: Any, _: Any) -> None:
    """Readers never wait for a writer, and what was committed outlives a crash of the machine."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=10000")
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Where several make the same file at once, SQLite refuses this instead of waiting."""
    for _ in range(100):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            time.sleep(0.01)
    cursor.execute("PRAGMA journal_mode=WAL")


def _reason(error: Exception) -> str:
    """One line, without the statement and its values."""
    reason = error.orig if isinstance(error, StatementError) else error
    return next(iter(str(reason).strip().splitlines()), type(error).__name__).rstrip(".")


def _without_secrets(text: str, url: URL) -> str:
    options = [value for key, value in url.query.items() if "password" in key]
    for secret in (url.password, *options):
        if secret:
            text = text.replace(str(secret), "***")
    return text
