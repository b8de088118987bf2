"""The whole engine with Llama-3-8B's shape: decode steps, prefills, and adapters on their way from
the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.floor import Work, linear_size, step_cost
from benchmarks.gpu_engine import MadeEngine, made_engine, packed_lora
from benchmarks.gpu_figures import Figure
from benchmarks.gpu_setup import BLOCK_SIZE, DTYPE, Setup
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_file import in_memory
from polydelta.engine.host_adapter import count_pages

# A step of the bare base takes no more than 1.25 of its floor, and adapters on top of it no more
# than 1.5 of theirs.
BASE_AIM, ADAPTER_AIM = 1 / 1.25, 1 / 1.5
RANK = 16
TURNS = 5


def decode(setup: Setup) -> Iterator[Figure]:
    """From token to token, scheduling and detokenising included; the pool takes what memory is
    left."""
    sizes, copy = setup.sizes, setup.ceilings.copy
    model = sizes.model
    numbers = linear_size(model) * model.num_layers + model.vocab_size * model.hidden_size
    weights = DTYPE.itemsize * numbers / copy
    with made_engine(setup, pool_bytes=None) as made:
        names = made.add_adapters(RANK, max(sizes.engine_adapters))
        one = made.adapter_bytes(names[0]) / copy
        for graphs in (True, False):
            made.use_graphs(graphs)
            how = "" if graphs else ", no CUDA graphs"
            for batch in sizes.engine_batches:
                step = made.decode_seconds(batch, ())
                name, aim = f"decode step, {batch} rows{how}", BASE_AIM if graphs else None
                yield Figure(f"{name}, base", step, weights, aim, facts=_facts(made, batch, step))
                for count in sizes.engine_adapters:
                    if count > batch:
                        continue
                    seconds = made.decode_seconds(batch, names[:count])
                    facts = _facts(made, batch, seconds)
                    floor = weights + count * one
                    name = f"decode step, {batch} rows{how}, {count} adapters"
                    yield Figure(name, seconds, floor, facts=facts)
                    aim = ADAPTER_AIM if graphs else None
                    name = f"{count} adapters' part, {batch} rows{how}"
                    yield Figure(name, seconds - step, count * one, aim)


def prefill(setup: Setup) -> Iterator[Figure]:
    """One prompt in one step, to its first token."""
    sizes = setup.sizes
    tokens = sizes.prompt
    with made_engine(setup) as made:
        names = made.add_adapters(RANK, 1)
        for whose, adapters in (("base", []), (f"an adapter of rank {RANK}", names)):
            made.run(1, adapters, tokens, 1)
            seconds = statistics.median(
                made.run(1, adapters, tokens, 1)[0].first_token for _ in range(TURNS)
            )
            work = Work(1, tokens, 1, [RANK] * len(adapters))
            cost = step_cost(sizes.model, work, tokens, tokens).total
            floor = setup.ceilings.floor(cost.nbytes, cost.flops)
            facts = {"tokens_per_second": round(tokens / seconds)}
            name = f"prefill of {tokens} tokens, {whose}"
            yield Figure(name, seconds, floor, main=True, facts=facts)


def swap(setup: Setup) -> Iterator[Figure]:
    """From page-locked memory of the host until a step can use it: copied and bound."""
    with made_engine(setup, start=False) as made:
        for rank in setup.sizes.swap_ranks:
            packed = in_memory(packed_lora(setup, rank, seed=0), pin=setup.on_gpu)
            need = count_pages(packed, setup.sizes.page_bytes, BLOCK_SIZE).total
            order = torch.randperm(2 * need, generator=torch.Generator().manual_seed(0)).tolist()
            for how, pages in (("in a row", list(range(need))), ("scattered", order[:need])):
                seconds = [_bind(setup, made, packed, pages) for _ in range(TURNS + 1)][1:]
                name = f"rank {rank} from the host, pages {how}"
                floor = packed.nbytes / setup.ceilings.upload
                facts = {"mbytes": round(packed.nbytes / 1e6, 1)}
                yield Figure(name, statistics.median(seconds), floor, main=True, facts=facts)


def _bind(setup: Setup, made: MadeEngine, packed: PackedAdapter, pages: list[int]) -> float:
    """Seconds. The engine's loop does not run."""
    began = time.perf_counter()
    made.runner.bind_adapter(packed, pages)
    if setup.on_gpu:
        torch.cuda.synchronize(setup.device)
    return time.perf_counter() - began


def _facts(made: MadeEngine, batch: int, seconds: float) -> dict[str, float]:
    facts: dict[str, float] = {"tokens_per_second": round(batch / seconds)}
    replay = made.replay_seconds()
    return facts if replay is None else facts | {"replay_us": round(replay * 1e6, 1)}
