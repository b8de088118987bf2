"""The catalog of uploaded versions: one row each, in SQLite or PostgreSQL."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    URL,
    Engine,
    Select,
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
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from polydelta.adapters_store.catalog_tables import (
    SCHEMA,
    SCHEMA_TABLE,
    AdapterRow,
    Base,
    SchemaRow,
    VersionRow,
    to_row,
    within,
)
from polydelta.adapters_store.errors import StoreError, UnknownAdapterError
from polydelta.adapters_store.id_globs import EVERY_ID, is_simple, matches
from polydelta.adapters_store.records import (
    AdapterRecord,
    Source,
    VersionState,
)

logger = logging.getLogger(__name__)


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
            select(VersionRow)
            .where(VersionRow.id == adapter_id, VersionRow.state == VersionState.READY.value)
            .order_by(VersionRow.version.desc())
            .limit(1)
        )
        return next(iter(self._records(query)), None)

    def find(self, adapter_id: str, version: int) -> AdapterRecord | None:
        query = select(VersionRow).where(VersionRow.id == adapter_id, VersionRow.version == version)
        return next(iter(self._records(query)), None)

    def versions(self, adapter_id: str) -> list[AdapterRecord]:
        """All versions, oldest first."""
        return self._records(
            select(VersionRow).where(VersionRow.id == adapter_id).order_by(VersionRow.version)
        )

    def knows(self, adapter_id: str) -> bool:
        """Whether the id was ever given a version here, gone ones included."""
        with self._session() as session:
            return session.get(AdapterRow, adapter_id) is not None

    def known(self, ids: Sequence[str] = EVERY_ID) -> set[str]:
        """All ids that `knows` knows, of those that the globs mean."""
        query = select(AdapterRow.id).where(within(AdapterRow.id, ids))
        with self._session() as session:
            return {found for found in session.scalars(query) if matches(found, ids)}

    def ready(self, ids: Sequence[str] = EVERY_ID) -> set[str]:
        """Ids that have a ready version, of those that the globs mean."""
        query = select(VersionRow.id).where(
            VersionRow.state == VersionState.READY.value, within(VersionRow.id, ids)
        )
        with self._session() as session:
            return {found for found in session.scalars(query.distinct()) if matches(found, ids)}

    def page(
        self,
        after: str,
        limit: int,
        labels: Mapping[str, str],
        kind: str | None,
        ids: Sequence[str] = EVERY_ID,
    ) -> list[AdapterRecord]:
        """Newest ready versions by id, those whose id comes after `after`; at most `limit`.

        ids: globs; other ids are left out.
        """
        newest = (
            select(VersionRow.id, func.max(VersionRow.version).label("version"))
            .where(
                VersionRow.state == VersionState.READY.value,
                VersionRow.id > after,
                within(VersionRow.id, ids),
            )
            .group_by(VersionRow.id)
            .subquery()
        )
        query = (
            select(VersionRow)
            .join(newest, (VersionRow.id == newest.c.id) & (VersionRow.version == newest.c.version))
            .order_by(VersionRow.id)
        )
        for key, value in labels.items():
            query = query.where(VersionRow.labels[key].as_string() == value)
        if kind is None and all(map(is_simple, ids)):
            return self._records(query.limit(limit))
        # A version has few kinds; databases differ in how they look into a list, and in globs.
        return [
            record
            for record in self._records(query)
            if (kind is None or kind in record.facts.kinds) and matches(record.id, ids)
        ][:limit]

    def in_state(self, state: VersionState) -> list[AdapterRecord]:
        return self._records(select(VersionRow).where(VersionRow.state == state.value))

    def pinned(self) -> list[AdapterRecord]:
        ready = VersionRow.state == VersionState.READY.value
        return self._records(select(VersionRow).where(VersionRow.pinned, ready))

    def compositions(self) -> list[AdapterRecord]:
        return self._records(
            select(VersionRow).where(VersionRow.source == Source.COMPOSITION.value)
        )

    def digests(self) -> set[str]:
        """Contents that some version has."""
        with self._session() as session:
            return set(session.scalars(select(VersionRow.digest).distinct()))

    def has_digest(self, digest: str) -> bool:
        with self._session() as session:
            query = select(VersionRow.id).where(VersionRow.digest == digest).limit(1)
            return session.scalar(query) is not None

    def total_bytes(self) -> int:
        """Of all contents, each counted once."""
        each = (
            select(func.max(VersionRow.nbytes).label("nbytes"))
            .group_by(VersionRow.digest)
            .subquery()
        )
        with self._session() as session:
            return int(session.scalar(select(func.sum(each.c.nbytes))) or 0)

    def contents(self, ids: Sequence[str]) -> dict[str, int]:
        """Bytes of the contents, by digest, that versions have whose ids the globs mean."""
        query = select(VersionRow.id, VersionRow.digest, VersionRow.nbytes)
        sizes: dict[str, int] = {}
        with self._session() as session:
            for found, digest, nbytes in session.execute(query.where(within(VersionRow.id, ids))):
                if matches(found, ids):
                    # A composition of one part has its digest, but no files.
                    sizes[digest] = max(nbytes, sizes.get(digest, 0))
        return sizes

    def change(self, adapter_id: str, version: int, **values: Any) -> AdapterRecord:
        """Sets `state`, `pinned` or `labels`. Raises UnknownAdapterError."""
        gone = UnknownAdapterError(f"There is no adapter '{adapter_id}@{version}' any more.")
        with self._session() as session, session.begin():
            row = session.get(VersionRow, (adapter_id, version))
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
                    update(VersionRow)
                    .where(VersionRow.id == adapter_id, VersionRow.version == version)
                    .values(uses=VersionRow.uses + count, last_used=when)
                )

    def remove(self, adapter_id: str, versions: Sequence[int]) -> None:
        with self._session() as session, session.begin():
            session.execute(
                delete(VersionRow).where(
                    VersionRow.id == adapter_id, VersionRow.version.in_(list(versions))
                )
            )

    def _add(self, record: AdapterRecord, at_least: int) -> AdapterRecord:
        with self._session() as session, session.begin():
            following = AdapterRow.last_version + 1
            # Written before it is read, so that others wait here until this one has its number.
            version = session.scalar(
                update(AdapterRow)
                .where(AdapterRow.id == record.id)
                .values(last_version=case((following > at_least, following), else_=at_least))
                .returning(AdapterRow.last_version)
                .execution_options(synchronize_session=False)
            )
            if version is None:
                version = at_least
                session.add(AdapterRow(id=record.id, last_version=version))
            added = replace(record, version=version)
            session.add(to_row(added))
        return added

    def _records(self, query: Select[Any]) -> list[AdapterRecord]:
        with self._session() as session:
            rows: Iterable[VersionRow] = session.scalars(query)
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
            Base.metadata.create_all(
                session.connection(), tables=[Base.metadata.tables[SCHEMA_TABLE]]
            )
            numbers = list(session.scalars(select(SchemaRow.number)))
            if numbers not in ([], [SCHEMA]):
                raise StoreError(
                    "The catalog was made by another version of PolyDelta (schema "
                    f"{numbers[-1]}, this one reads {SCHEMA}): use that version, or another "
                    "catalog."
                )
            Base.metadata.create_all(session.connection())
            if not numbers:
                session.add(SchemaRow(number=SCHEMA))


class _CatalogSession(Session):
    """Turns what a database raises into what this package raises."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, SQLAlchemyError) and not isinstance(error, IntegrityError):
            # A driver names the host and the user, which are no client's business.
            logger.error("the catalog does not answer: %s", _reason(error))
            raise StoreError("The catalog does not answer; see the server's log.") from error


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
