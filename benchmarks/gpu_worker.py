"""A process that measures sections of the GPU benchmark. Whatever one of them does to its process,
or to the GPU's context in it, a new one goes on with the next."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

import torch

from benchmarks import gpu_deltas, gpu_kernels, gpu_kv, gpu_parity, gpu_serving, gpu_tuning
from benchmarks.gpu_clock import Ceilings
from benchmarks.gpu_figures import Figure, Section
from benchmarks.gpu_setup import FULL, QUICK, Setup, make_setup


def parity(setup: Setup) -> Iterator[Figure]:
    sizes = setup.sizes
    yield from gpu_parity.compare(setup.kernels, sizes.parity_model, sizes.parity_tokens)


# In the order in which they run.
SECTIONS: Mapping[str, Callable[[Setup], Iterator[Figure]]] = {
    "parity": parity,
    "tuning": gpu_tuning.tuning,
    "lora": gpu_deltas.lora,
    "lora-prefill": gpu_deltas.lora_prefill,
    "kinds": gpu_deltas.kinds,
    "attention": gpu_kernels.attention,
    "small": gpu_kernels.small,
    "sampling": gpu_kernels.sampling,
    "products": gpu_kernels.products,
    "decode": gpu_serving.decode,
    "prefill": gpu_serving.prefill,
    "swap": gpu_serving.swap,
    "other-ways": gpu_deltas.lora_other_ways,
    "kv": gpu_kv.attention,
    "kv-serving": gpu_kv.serving,
}


class Worker:
    """Runs one section at a time."""

    def __init__(self, quick: bool) -> None:
        """quick: tiny sizes."""
        if not torch.cuda.is_available():
            # Its process begins with it, before anything imports Triton.
            os.environ["TRITON_INTERPRET"] = "1"
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, quick), daemon=True)
        self._process.start()
        other.close()
        # Known once something was measured.
        self.ceilings: Ceilings | None = None

    def run(self, name: str, limit: float, tell: Callable[[Figure], None]) -> Section:
        """Up to the section's end, to what fails, or to as many seconds. tell: called with each
        figure. After a section with an error the worker must be killed."""
        section, began = Section(name), time.perf_counter()
        try:
            self._pipe.send(name)
            while (left := began + limit - time.perf_counter()) > 0 and self._pipe.poll(left):
                match self._pipe.recv():
                    case Ceilings() as ceilings:
                        self.ceilings = ceilings
                    case Figure() as figure:
                        section.figures.append(figure)
                        tell(figure)
                    case error:
                        section.error = error
                        break
            else:
                section.error = f"It was not done after {limit:.0f} s."
        except (EOFError, OSError):
            self._process.join()
            section.error = f"Its process ended with {self._process.exitcode}."
        section.seconds = time.perf_counter() - began
        return section

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, quick: bool) -> None:
    """Takes names of sections; gives ceilings, figures, and after those of a section its error or
    None."""
    setup: Setup | None = None
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            if setup is None:
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                setup = make_setup(device, QUICK if quick else FULL)
                pipe.send(setup.ceilings)
            for figure in SECTIONS[name](setup):
                pipe.send(figure if setup.on_gpu else figure.without_times())
            # Cycles would keep what the section has left.
            gc.collect()
            setup.settle()
        except Exception:
            pipe.send(traceback.format_exc(limit=-6))
        else:
            pipe.send(None)
