"""Everything that is measured on one GPU: kernels, the engine in Llama-3-8B's shape, parity.

    python -m benchmarks.gpu

Times are the GPU's own; floors are those of its bandwidth and its products, measured in the same
run. A section that fails is told, and the others go on. With `--quick` everything runs at tiny
sizes, without a GPU too, and only what is right and wrong is told.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu_clock import Ceilings
from benchmarks.gpu_figures import Figure, Section, show
from benchmarks.gpu_worker import SECTIONS, Worker
from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
# Seconds of the whole run, and of one section.
LIMIT, SECTION_LIMIT = 470.0, 200.0


def run_sections(
    names: Sequence[str], quick: bool, console: Console
) -> tuple[list[Section], Ceilings | None]:
    """In their order, for as long as there is time."""
    worker: Worker | None = None
    ceilings: Ceilings | None = None
    end, done = time.monotonic() + LIMIT, []

    def tell(figure: Figure) -> None:
        console.print("  " + "  ".join(cell for cell in figure.cells() if cell))

    for name in names:
        if time.monotonic() > end:
            done.append(Section(name, error="It was left out: the time was up."))
            continue
        console.print(f"[bold]{name}[/]")
        worker = worker or Worker(quick)
        section = worker.run(name, min(SECTION_LIMIT, end - time.monotonic()), tell)
        ceilings = ceilings or worker.ceilings
        done.append(section)
        if section.error is not None:
            console.print(section.error, markup=False, highlight=False)
            worker.kill()
            worker = None
    if worker is not None:
        worker.kill()
    return done, ceilings


def describe_gpu() -> dict[str, Any]:
    """The machine, and what runs the kernels."""
    facts = describe_machine() | {"triton": version("triton"), "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "driver": _driver_version(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _driver_version() -> str | None:
    """None where NVIDIA's tool is not at hand."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = (tool, "--query-gpu=driver_version", "--format=csv,noheader")
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None


def main(
    sections: Annotated[
        str, typer.Option(help=f"Some of them, with commas between: {', '.join(SECTIONS)}.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes; runs without a GPU, too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the JSON result goes; by default into results/, if not --quick."),
    ] = None,
) -> None:
    """Measures, and prints a table of what has an aim. Ends with 1 when a section failed, or
    a result was wrong."""
    console, began = Console(), time.perf_counter()
    names = [name.strip() for name in sections.split(",") if name.strip()] or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise typer.BadParameter(f"There is no section {unknown[0]!r}.")
    if not quick and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU; without one there is only --quick.")
    machine = describe_gpu()
    done, ceilings = run_sections(names, quick, console)
    seconds = time.perf_counter() - began
    title = f"{machine['gpu'] or 'Without a GPU: no times'}, measured in {seconds:.0f} s"
    console.print(show(done, title))
    if ceilings is not None and machine["gpu"]:
        machine |= ceilings.to_json()
    result = {
        "benchmark": "gpu",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "seconds": round(seconds, 1),
        "sections": [section.to_json() for section in done],
    }
    if output is None and not quick:
        slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
        output = RESULTS / f"gpu-{slug}.json"
    if output is not None:
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    figures = [figure for section in done for figure in section.figures]
    failed = any(section.error is not None for section in done)
    raise typer.Exit(int(failed or any(figure.is_wrong for figure in figures)))


if __name__ == "__main__":
    typer.run(main)
