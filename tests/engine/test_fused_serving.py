"""Requests over an engine that may write the only adapter of a batch into the base weights."""

from __future__ import annotations

import time
from collections.abc import Callable

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.engine import Engine
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.request import GenerationRequest, SamplingParams


def write(writer: Callable, checkpoint: Checkpoint) -> FolderCatalog:
    files = writer(base_layout(checkpoint.config, checkpoint.id))
    files.lora("lora", 5, seed=1, scale=0.5)
    files.shira("shira", 2, seed=2, scale=0.3)
    return FolderCatalog([files.root])


def request(
    number: int, catalog: FolderCatalog, name: str | None, tokens: int
) -> GenerationRequest:
    prompt = [3 + (37 * number + 11 * place) % 4000 for place in range(9)]
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    adapters = (Share(catalog.resolve(name)),) if name else ()
    return GenerationRequest(f"{name}-{number}", prompt, params, adapters)


def is_fused(engine: Engine) -> bool:
    """Whether some layer's weight has an adapter in it now."""
    fusion = engine._runner._fusion
    return fusion is not None and fusion._inside is not None


def test_answers_in_fused_mode_equal_unmerged_ones_and_the_base_comes_back_unchanged(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    catalog = write(adapter_writer, tiny_checkpoint)
    names = [None, "lora", "lora", "shira", None, "shira", "lora"]
    requests = [request(number, catalog, name, 60) for number, name in enumerate(names)]
    mixed = [request(10 + number, catalog, name, 30) for number, name in enumerate(names)]
    with serve(tiny_checkpoint, prefix_caching=False) as engine:
        want = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in requests}
        want_mixed = {k: a.token_ids for k, a in run(engine, mixed).items()}
        assert not is_fused(engine)
    with serve(tiny_checkpoint, prefix_caching=False, fuse_after=2) as engine:
        for one in requests:
            run(engine, [one])  # makes the adapter ready, beside the loop
            deadline = time.monotonic() + 20
            while one.adapters and not is_fused(engine) and time.monotonic() < deadline:
                run(engine, [one])
            assert is_fused(engine) == bool(one.adapters)
            answer = run(engine, [one])[one.request_id]
            assert answer.token_ids == want[one.request_id]
        got_mixed = {k: a.token_ids for k, a in run(engine, mixed).items()}
        assert got_mixed == want_mixed


def test_an_evicted_adapter_leaves_the_base_weights_and_nothing_is_kept_of_it(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    catalog = write(adapter_writer, tiny_checkpoint)
    one = request(1, catalog, "lora", 30)
    with serve(tiny_checkpoint, prefix_caching=False, fuse_after=2) as engine:
        deadline = time.monotonic() + 20
        while not is_fused(engine) and time.monotonic() < deadline:
            want = run(engine, [one])[one.request_id].token_ids
        assert is_fused(engine)
        engine.evict_adapter(catalog.resolve("lora")).result(20)
        assert not is_fused(engine)
        assert engine._runner._fusion._prepared is None
        assert run(engine, [one])[one.request_id].token_ids == want
