"""`polydelta adapters push`: a folder's adapter sent to a running server."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE
from polydelta.server.settings import env_name

if TYPE_CHECKING:  # `polydelta --help` must not wait for it
    import httpx

# Seconds without a byte; the server reads and checks the whole adapter before it answers.
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 600.0

# Told of bytes that were sent.
OnSent = Callable[[int], object]


class PushError(Exception):
    """An adapter that could not be sent, or that the server refused; the message says why."""


def push(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="An adapter's folder, or a .zip or .tar.gz file of one.",
            exists=True,
        ),
    ],
    adapter_id: Annotated[str, typer.Option("--id", help="What requests call the adapter.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A label; may be given several times. Without any, those of the version before"
            " stay.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"Key that the server asks for; without it, the first of {env_name('api_key')}."
        ),
    ] = None,
) -> None:
    """Send an adapter to a running server, where it is checked and becomes the newest version.

    Nothing changes when the newest version already is the same.

    [bold]Examples[/bold]

    [cyan]polydelta adapters push ./my-adapter --id sql[/cyan]
    requests name it `sql`, and this version of it `sql@1`

    [cyan]polydelta adapters push ./my-adapter --id sql --label team=search --label new=yes[/cyan]
    with labels, to find it again

    [cyan]polydelta adapters push ./my-adapter.zip --id sql --url https://llm.example.com[/cyan]
    from an archive, to another machine
    """
    fields = {"id": adapter_id}
    if label:
        fields["labels"] = json.dumps(_labels(label))
    key = api_key or os.environ.get(env_name("api_key"), "").split(",")[0]
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        paths = _files(source)
        total = sum(path.stat().st_size for path in paths)
        task = progress.add_task(f"sending {source.name}", total=total)

        def on_sent(nbytes: int) -> None:
            progress.advance(task, nbytes)
            if progress.tasks[task].finished:
                progress.update(task, description="the server checks it")

        files = [stack.enter_context(_Watched(path, on_sent)) for path in paths]
        answer = _post(url, key, fields, files)
    Console().print(_facts(answer))


class _Watched(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, on_sent: OnSent) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            raise PushError(f"{str(path)!r} cannot be read ({error.strerror}).") from None
        self._on_sent = on_sent

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(-1 if size is None else size)
        self._on_sent(len(chunk))
        return chunk


def _files(source: Path) -> list[Path]:
    """What is sent. Raises PushError."""
    if not source.is_dir():
        return [source]
    files = [source / CONFIG_FILE, source / WEIGHTS_FILE]
    for path in files:
        if not path.is_file():
            raise PushError(
                f"DIR: {str(source)!r} has no {path.name}: name the folder that "
                "`save_pretrained(..., safe_serialization=True)` wrote."
            )
    return files


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    """Raises PushError."""
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PushError(f"--label: {pair!r} has no value; write {pair}=VALUE.")
        labels[key] = value
    return labels


def _progress() -> Progress:
    """On standard error; in a log file a bar is noise."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _post(
    url: str, key: str, fields: Mapping[str, str], files: Sequence[_Watched]
) -> dict[str, Any]:
    """The record in the server's answer, with its status in `status`. Raises PushError."""
    import httpx

    if not url.startswith(("http://", "https://")):
        raise PushError(f"--url: {url!r} is no HTTP address: write http://HOST:PORT.")
    # Clients of OpenAI's API have the /v1 in their base URL.
    base = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.post(
            f"{base}/v1/adapters",
            data=fields,
            # Sent in pieces as they are read.
            files=[("files", (Path(os.fsdecode(file.name)).name, file)) for file in files],
            headers={b"Authorization": f"Bearer {key}".encode()} if key else None,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise PushError(
            f"--url: {url!r} does not answer ({reason}): start `polydelta serve`, or name another "
            "server."
        ) from None
    if not answer.is_success:
        raise PushError(_refusal(answer))
    try:
        record = answer.json()
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("object") != "adapter":
        raise PushError(f"--url: what answers at {url!r} is no PolyDelta server.")
    return {**record, "status": answer.status_code}


def _refusal(answer: httpx.Response) -> str:
    """Why the server does not take it."""
    try:
        reason = str(answer.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):
        reason = answer.text.strip()[:200] or answer.reason_phrase
    return f"The server refused it ({answer.status_code}): {reason}"


def _facts(record: Mapping[str, Any]) -> Table:
    """The version that there is now, for people."""
    facts = Table.grid(padding=(0, 2))

    def row(name: str, cell: object) -> None:
        facts.add_row(name, escape(str(cell)))

    facts.add_row(
        "adapter",
        f"[bold]{escape(record['name'])}[/bold]"
        + ("" if record["status"] == 201 else " (was there already: the same content)"),
    )
    row("format", f"{record['format']}, {', '.join(record['kinds'])}")
    if record["rank"]:
        row("rank", record["rank"])
    row("modules", record["modules"])
    row("size", ByteSize(record["bytes"]).human_readable())
    row("sha256", record["sha256"])
    if record["labels"]:
        row("labels", ", ".join(f"{key}={value}" for key, value in record["labels"].items()))
    row("state", record["state"])
    if record["ignored"]:
        row("not kept", ", ".join(record["ignored"]))
    return facts
