"""What Triton's kernels take of a GPU, and the least time that they need there, found without one.

    python -m benchmarks.kernel_resources --arch 90 --match attention

Every kernel is compiled in every configuration that it ships for. The floor is not measured: it is
what a typical launch must move or multiply, at the figures of the GPUs' datasheets.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich import box
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.wide_console import wide_console
from polydelta.kernels.triton.shipped import MODULES, shipped
from polydelta.kernels.triton.shipping import Floor, ShippedKernel

WARP_SIZE = 32


@dataclass(frozen=True)
class Gpu:
    """A datasheet: dense products of bfloat16, without sparsity."""

    name: str
    # Bytes a second.
    memory: float
    # Floating-point operations a second.
    matmul: float

    def seconds(self, floor: Floor) -> float:
        return max(floor.bytes / self.memory, floor.flops / self.matmul)


# By compute capability, times ten.
GPUS = {80: Gpu("A100 80 GB SXM", 2.039e12, 312e12), 90: Gpu("H100 SXM", 3.35e12, 989e12)}


@dataclass(frozen=True)
class Resources:
    """Of one thread, but for the shared memory, which a whole program has."""

    registers: int
    # Bytes of local memory: what did not fit into registers.
    spilled: int
    # Bytes.
    shared: int


@dataclass(frozen=True)
class Compiled:
    """One configuration for one GPU; resources or an error."""

    module: str
    name: str
    arch: int
    hot: bool = False
    warps: int = 0
    floor: Floor | None = None
    resources: Resources | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it does not compile, or spills though most steps launch it."""
        return self.resources is None or (self.hot and self.resources.spilled > 0)

    def to_json(self) -> dict[str, Any]:
        gpu = GPUS[self.arch]
        json = {"module": self.module, "name": self.name, "arch": self.arch, "hot": self.hot}
        if self.resources is not None:
            json |= {
                "warps": self.warps,
                "registers": self.resources.registers,
                "spilled_bytes": self.resources.spilled,
                "shared_bytes": self.resources.shared,
            }
        if self.floor is not None:
            json |= {
                "work": self.floor.work,
                "bytes": self.floor.bytes,
                "flops": self.floor.flops,
                "floor_us": round(gpu.seconds(self.floor) * 1e6, 2),
                "floor_of": gpu.name,
            }
        return json | {"error": self.error}


@dataclass(frozen=True)
class Task:
    """One configuration, by its place in what `shipped(module)` gives: other processes find it
    there."""

    module: str
    place: int
    arch: int


def find_tasks(arches: Sequence[int], match: str) -> tuple[list[Task], list[Compiled]]:
    """Configurations with `match` in their names; and modules that could not be asked."""
    tasks, failures = [], []
    for module in MODULES:
        try:
            names = [kernel.name for kernel in _shipped(module)]
        except Exception:
            error = traceback.format_exc(limit=-3)
            failures += [Compiled(module, f"{module} (all)", arch, error=error) for arch in arches]
            continue
        tasks += [
            Task(module, place, arch)
            for place, name in enumerate(names)
            for arch in arches
            if match in f"{module} {name}"
        ]
    return tasks, failures


def compile_all(tasks: Sequence[Task], workers: int) -> Iterator[Compiled]:
    """In their order, in so many processes."""
    with _processes(workers) as processes:
        futures = [processes.submit(compile_task, task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                # One has brought the compiler down, and all that were waiting with it.
                yield _compile_alone(task)


def compile_task(task: Task) -> Compiled:
    kernel = _shipped(task.module)[task.place]
    try:
        return replace(_blank(task), resources=measure_resources(kernel, task.arch))
    except Exception:
        return replace(_blank(task), error=traceback.format_exc(limit=-3))


def _compile_alone(task: Task) -> Compiled:
    with _processes(1) as process:
        try:
            return process.submit(compile_task, task).result()
        except BrokenProcessPool:
            return replace(_blank(task), error="The compiler's process died.")


def _blank(task: Task) -> Compiled:
    """With neither resources nor an error."""
    kernel = _shipped(task.module)[task.place]
    warps = kernel.options.get("num_warps", 4)
    return Compiled(task.module, kernel.name, task.arch, kernel.hot, warps, kernel.floor)


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def measure_resources(kernel: ShippedKernel, arch: int) -> Resources:
    """Compiles to machine code; no GPU is needed."""
    names = kernel.kernel.arg_names
    source = ASTSource(
        kernel.kernel,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned},
    )
    target = GPUTarget("cuda", arch, WARP_SIZE)
    compiled = triton.compile(source, target=target, options=dict(kernel.options))
    usage = resource_usage(compiled.asm["cubin"])
    # Its shared memory is asked for at the launch, of which the machine code knows nothing.
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What NVIDIA's tool, which comes with Triton, says of a file of machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@functools.cache
def _shipped(module: str) -> list[ShippedKernel]:
    return shipped(module)


def show(compiled: Sequence[Compiled], arches: Sequence[int]) -> Table:
    """One row for each configuration, with the figures of one GPU beside those of the next."""
    title = "Triton's kernels on " + ", ".join(f"{GPUS[arch].name} (sm_{arch})" for arch in arches)
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("", "launch", "warps", "registers", "spilled B", "shared KiB", "at least us"):
        table.add_column(column, justify="left" if column in ("", "launch") else "right")
    rows: dict[tuple[str, str], list[Compiled]] = {}
    for one in compiled:
        rows.setdefault((one.module, one.name), []).append(one)
    for (_, name), each in rows.items():
        floor = each[0].floor
        resources = [one.resources for one in each]
        table.add_row(
            name,
            "" if floor is None else floor.work,
            f"{each[0].warps or ''}",
            _beside(r and r.registers for r in resources),
            _beside(r and r.spilled for r in resources),
            _beside(r and round(r.shared / 1024) for r in resources),
            _beside(floor and f"{GPUS[one.arch].seconds(floor) * 1e6:.1f}" for one in each),
            style="red" if any(one.failed for one in each) else None,
        )
    table.caption = "red: it does not compile, or it spills though most steps launch it"
    return table


def _beside(values: Iterable[object]) -> str:
    return ", ".join("-" if value is None else f"{value}" for value in values)


def main(
    arch: Annotated[
        list[int] | None, typer.Option(help="80 or 90; may be given twice. Both if not given.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only kernels with this in their names.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that compile.", min=1)] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the result goes as JSON.")
    ] = None,
) -> None:
    """Compiles all kernels and prints what they take. Ends with 1 when one failed."""
    # Names are long; where there is no terminal, Rich would take 80 columns.
    console = wide_console()
    arches = sorted(set(arch or GPUS))
    if unknown := set(arches) - GPUS.keys():
        raise typer.BadParameter(f"sm_{unknown.pop()} is not among {', '.join(map(str, GPUS))}.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("Triton's interpreter compiles nothing: unset TRITON_INTERPRET.")
    tasks, compiled = find_tasks(arches, match)
    if not tasks and not compiled:
        raise typer.BadParameter(f"No kernel has {match!r} in its name.")
    results = compile_all(tasks, workers)
    compiled += track(results, "Compiling", total=len(tasks), console=console)
    console.print(show(compiled, arches))
    for one in compiled:
        if one.error is not None:
            console.print(f"[red]{one.module}: {one.name}, sm_{one.arch}[/]")
            console.print(one.error, markup=False, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps([one.to_json() for one in compiled], indent=2) + "\n")
    raise typer.Exit(int(any(one.failed for one in compiled)))


if __name__ == "__main__":
    typer.run(main)
