"""The same work over HTTP against any OpenAI-style server, ours or another.

    python -m benchmarks.http_bench http://127.0.0.1:8000 --model base,adapter-1 --stream
    python -m benchmarks.http_bench --serve "--adapters ./adapters" --output result.json

Requests to /v1/completions, greedy and not ended by the model, so many at a time, in turn over the
models. No two prompts are alike: a prefix cache would flatter. Prompts are token ids where the
server takes them; elsewhere they are words, as many as make about as many tokens.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.http_client import Endpoint
from benchmarks.http_work import (
    BAD_ANSWER,
    COMPLETIONS,
    PERCENTILES,
    Dialect,
    Prompts,
    Result,
    Work,
    percentiles,
    run,
)
from benchmarks.machine import describe_machine
from benchmarks.served import served


async def learn_dialect(endpoint: Endpoint, work: Work, random: Random) -> Dialect:
    """The most that the server takes, by asking. Raises RuntimeError when it takes nothing."""
    refusal = ""
    for token_ids in (True, False):
        for ignore_eos in (True, False):
            dialect, result = Dialect(token_ids, ignore_eos), Result()
            body = Prompts(work, dialect, random).body(work.models[0])
            try:
                result.add(await endpoint.post(COMPLETIONS, body), work.stream)
            except BAD_ANSWER as problem:
                refusal = str(problem)
                continue
            words = 1.0 if token_ids else work.prompt_tokens / result.prompt_tokens
            return Dialect(token_ids, ignore_eos, words)
    raise RuntimeError(f"{endpoint.url} refuses: {refusal}")


async def measure(endpoint: Endpoint, work: Work) -> tuple[Dialect, Result]:
    """Warms up by one request of each client and each model, then runs."""
    random = Random(work.seed)
    dialect = await learn_dialect(endpoint, work, random)
    warming = max(work.concurrency, len(work.models))
    await run(endpoint, replace(work, requests=warming), dialect, random)
    return dialect, await run(endpoint, work, dialect, random)


async def served_models(endpoint: Endpoint) -> list[str]:
    answer = await endpoint.get("/v1/models")
    if answer.status != 200:
        raise RuntimeError(f"{endpoint.url}/v1/models answers {answer.status}.")
    return [card["id"] for card in json.loads(answer.body)["data"]]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never rest, beside whatever runs here."""
    started = [subprocess.Popen([sys.executable, "-c", "while 1: 0"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def report(work: Work, dialect: Dialect, result: Result, console: Console) -> None:
    title = f"{work.requests} requests, {work.concurrency} at a time, {len(work.models)} models"
    table = Table(title=title, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("output tokens a second", f"{result.tokens_per_second:.1f}")
    table.add_row("requests a second", f"{result.requests_per_second:.2f}")
    came = f"{result.output_tokens} of {work.requests * work.max_tokens}"
    table.add_row("output tokens", came if dialect.ignore_eos else f"{came} (ends on its own)")
    kind = "token ids" if dialect.token_ids else "words"
    table.add_row("prompt tokens", f"{result.prompt_tokens} ({kind})")
    for name, seconds in (
        ("request", result.latency),
        ("first token", result.first_token),
        ("between tokens", result.token_gaps),
    ):
        if figures := percentiles(seconds):
            told = " / ".join(f"{figures[f'p{p}']:.1f}" for p in PERCENTILES)
            table.add_row(f"{name}, ms, p{'/'.join(map(str, PERCENTILES))}", told)
    share = result.client_cpu_seconds / result.seconds
    table.add_row("this client's share of a core", f"{share:.1%}")
    table.add_row("errors", f"[red]{len(result.errors)}[/]" if result.errors else "0")
    console.print(table)


async def bench(endpoint: Endpoint, work: Work, beside: int) -> dict[str, Any]:
    """Measures, prints, and returns what the result file says of the server and the work."""
    models = await served_models(endpoint)
    if not work.models:
        work = replace(work, models=models[:1])
    with busy(beside):
        dialect, result = await measure(endpoint, work)
    report(work, dialect, result, Console())
    return {
        "server": {"url": endpoint.url, "models": models},
        "work": asdict(work) | {"busy_processes": beside},
        "dialect": asdict(dialect),
        "result": result.to_json(),
    }


def main(
    url: Annotated[str | None, typer.Argument(help="Of a server that runs.")] = None,
    serve: Annotated[
        str | None, typer.Option(help="Starts `polydelta serve` with these arguments instead.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Names, with commas between; the server's first if none.")
    ] = "",
    requests: Annotated[int, typer.Option(min=1)] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request.")] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="Server-sent events.")] = False,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    busy_processes: Annotated[
        int, typer.Option("--busy", min=0, help="Processes that spin beside the server.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(help="Of the prompts; none: others in every run.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes.")] = None,
) -> None:
    """Measures an OpenAI-style server over HTTP."""
    if (url is None) == (serve is None):
        raise typer.BadParameter("Name the URL of a server, or start one with --serve.")
    names = [name for name in model.split(",") if name]
    # The same prompts once more would find their KV in a server's prefix cache.
    seed = time.time_ns() if seed is None else seed
    work = Work(names, requests, concurrency, prompt_tokens, max_tokens, stream, seed)
    result: dict[str, Any] = {
        "benchmark": "http_bench",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
    }
    if url is not None:
        result |= asyncio.run(bench(Endpoint(url, api_key), work, busy_processes))
    else:
        with served(serve or "") as server:
            print(f"Ready after {server.seconds_to_ready:.2f} s.")
            result |= asyncio.run(bench(Endpoint(server.url, api_key), work, busy_processes))
        result["server"] |= {
            "arguments": serve,
            "seconds_to_ready": round(server.seconds_to_ready, 2),
        }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    if result["result"]["errors"]:
        sys.exit(
            f"{result['result']['errors']} requests failed: {result['result']['first_errors']}"
        )


if __name__ == "__main__":
    typer.run(main)
