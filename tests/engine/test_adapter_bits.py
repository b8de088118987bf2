"""Engines whose adapters lie in the pool in 8 or 4 bits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.drift import log_probabilities
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.errors import ModelError
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.kernels.ops import kernels_for

BITS = pytest.mark.parametrize("bits", [8, 4])
TOKENS = [1, 4000, 7]
# How far predictions may move, as a share of how far the adapter itself moves them.
MOST_MOVED = {8: 0.015, 4: 0.2}


@pytest.fixture
def catalog(tiny_checkpoint: Checkpoint, adapter_writer: Callable) -> FolderCatalog:
    files = adapter_writer(base_layout(tiny_checkpoint.config, tiny_checkpoint.id))
    files.lora("lora", 5, seed=1, scale=0.5)
    files.lora("large", 33, seed=3, scale=0.2)
    files.shira("shira", 2, seed=2, scale=0.3)
    return FolderCatalog([files.root])


def requests(catalog: FolderCatalog, tokens: int = 20) -> list[GenerationRequest]:
    """Of the base, of each adapter, and of a sum, with prompts of different lengths."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    names = ((), ("lora",), ("shira",), ("large",), ("lora", "large"), ("lora",))
    return [
        GenerationRequest(
            f"{number}",
            [3 + (37 * number + 11 * place) % 4000 for place in range(7 + 5 * number)],
            params,
            tuple(Share(catalog.resolve(name), 1.0 / len(each)) for name in each),
        )
        for number, each in enumerate(names)
    ]


def test_predictions_stay_near_those_of_whole_adapters(
    tiny_checkpoint: Checkpoint, catalog: FolderCatalog, serve: Callable
) -> None:
    def predictions(bits: int | None, *names: str | None) -> list[Tensor]:
        with serve(tiny_checkpoint, pool_bytes=128 << 20, adapter_bits=bits) as engine:
            refs = [catalog.resolve(name) if name else None for name in names]
            return [log_probabilities(engine, TOKENS, ref) for ref in refs]

    base, whole, entries = predictions(None, None, "lora", "shira")
    for bits, most in MOST_MOVED.items():
        rounded, same = predictions(bits, "lora", "shira")
        assert 0 < (rounded - whole).norm() <= most * (whole - base).norm()
        # What has no low-rank matrices stays as it is.
        assert torch.equal(same, entries)


@BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_that_share_a_batch_answer_as_they_do_alone(
    tiny_checkpoint: Checkpoint,
    catalog: FolderCatalog,
    serve: Callable,
    run: Callable,
    bits: int,
    dtype: str,
) -> None:
    # In bfloat16 many rows of one adapter are rounded otherwise than few.
    each = requests(catalog)[: 6 if dtype == "float32" else 5]
    options = {"dtype": dtype, "adapter_bits": bits, "prefix_caching": False}
    with serve(tiny_checkpoint, **options) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in each}
        together = {key: answer.token_ids for key, answer in run(engine, each).items()}
    assert together == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == len(each)


def test_an_adapter_takes_fewer_pages(
    tiny_checkpoint: Checkpoint, catalog: FolderCatalog, serve: Callable
) -> None:
    """Of rows of 60 columns, which are padded to 64 bytes in 4 bits as in 8."""
    pages = {}
    for bits in (None, 4):
        with serve(tiny_checkpoint, adapter_bits=bits, block_size=1) as engine:
            ref = catalog.resolve("large")
            engine.load_adapter(ref).result(60)
            pages[bits] = engine.adapter_place(ref).pages
    assert pages[4] <= 0.55 * pages[None]


@BITS
def test_they_go_into_the_base_weights_and_out_again(
    tiny_checkpoint: Checkpoint, catalog: FolderCatalog, serve: Callable, run: Callable, bits: int
) -> None:
    bare, adapted = requests(catalog, tokens=40)[:2]
    options = {"adapter_bits": bits, "prefix_caching": False}
    with serve(tiny_checkpoint, **options) as engine:
        want = [run(engine, [r])[r.request_id].token_ids for r in (bare, adapted)]
    with serve(tiny_checkpoint, fuse_after=1, **options) as engine:
        deadline = time.monotonic() + 20
        while engine._runner._fusion._inside is None and time.monotonic() < deadline:
            run(engine, [adapted])
        assert engine._runner._fusion._inside is not None
        got = [run(engine, [r])[r.request_id].token_ids for r in (adapted, bare)]
    assert got == want[::-1]


def test_other_numbers_of_bits_are_refused_at_the_start(tiny_checkpoint: Checkpoint) -> None:
    kernels = kernels_for(torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match="adapter_bits 5 is not supported: use 8 or 4"):
        assemble(tiny_checkpoint, EngineConfig(dtype="float32", adapter_bits=5), kernels)
