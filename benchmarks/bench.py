"""All of what `make bench` runs: the floor, the engine against PEFT, and the server over HTTP.

    python -m benchmarks.bench

The rows are those of `vs_peft.py`; over HTTP four requests follow each other for every place in the
batch, to a server that has the same adapters. Ends with one table.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import http_work
from benchmarks.comparison import WITH_ADAPTERS, Row, show
from benchmarks.http_bench import busy, measure, served_models
from benchmarks.http_client import Endpoint
from benchmarks.served import served
from benchmarks.vs_peft import compare

# Requests for each place in the batch; one where a busy process makes all of them slow.
FOLLOWING = 4
RESULT = Path(__file__).parent / "results" / "bench.json"


def http_results(
    rows: Sequence[Row], adapters: Sequence[str], folder: Path, console: Console
) -> dict[str, http_work.Result]:
    """By row. The base has its turn before the server has seen an adapter, and once more at the
    end. Raises RuntimeError when a request fails."""
    order = sorted(rows, key=lambda row: row.ours == WITH_ADAPTERS and not row.work.ranks)
    with served(shlex.join(("--adapters", str(folder)))) as server:
        console.print(f"The server was ready after {server.seconds_to_ready:.1f} s.")
        endpoint = Endpoint(server.url)
        base = asyncio.run(served_models(endpoint))[0]
        results = {}
        for row in order:
            console.print(f"Over HTTP: {row.name}.")
            names = [name or base for name in dict.fromkeys(row.names(adapters))]
            results[row.name] = result = _over_http(endpoint, row, names)
            if result.errors:
                raise RuntimeError(f"{row.name}: {result.errors[0]}")
    return results


def _over_http(endpoint: Endpoint, row: Row, models: Sequence[str]) -> http_work.Result:
    work = http_work.Work(
        models,
        row.work.batch * (1 if row.busy else FOLLOWING),
        row.work.batch,
        row.work.prompt_tokens,
        row.work.new_tokens,
        stream=True,
        # The same prompts once more would find their KV in the prefix cache.
        seed=time.time_ns(),
    )
    with busy(row.busy):
        _, result = asyncio.run(measure(endpoint, work))
    return result


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds of most rows.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """The whole table."""
    console = Console()
    with tempfile.TemporaryDirectory() as each:
        folder = Path(each)
        comparison = compare(rounds, folder, console)
        http = http_results(comparison.rows, comparison.adapters, folder, console)
    speeds = {name: result.tokens_per_second for name, result in http.items()}
    console.print(show(comparison.rows, comparison.floors, speeds))
    result = {"benchmark": "bench", "date": time.strftime("%Y-%m-%d")} | comparison.to_json()
    result["http"] = {name: each.to_json() for name, each in http.items()}
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
