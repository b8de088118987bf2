"""Greedy answers on a GPU beside those on the CPU, in float32: a small random model, and adapters
with every kind of delta that is served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

import torch

from benchmarks.gpu_adapters import StrongPlace
from benchmarks.gpu_figures import Figure
from benchmarks.made_model import made_checkpoint
from benchmarks.mixed_kinds import MadeAdapters
from benchmarks.timed_answer import TimedAnswer
from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.composition import Share, Shares, combine
from polydelta.adapters_store.delta import Adapter, Delta
from polydelta.adapters_store.formats.format_table import Part, on
from polydelta.adapters_store.formats.usual_deltas import (
    bias,
    circulant,
    columns,
    input_scale,
    invocation,
    kronecker,
    low_rank,
    norm_weight,
    one_bit,
    output_scale,
    prefix,
    prompt,
    rotate,
    rows,
    sparse,
    token_rows,
    top_k,
)
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_spec import kv_page_bytes
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.request import GenerationRequest, RequestOutput, SamplingParams
from polydelta.kernels.ops import Kernels, kernels_for

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of an adapter's numbers: about as much as the base does.
STRENGTH = 0.2
ADAPTERS: Mapping[str, Sequence[Part]] = {
    "LowRank": [on(LINEAR, low_rank(5))],
    "LowRank, rank 70": [on(("q_proj", "down_proj"), low_rank(70))],
    "LowRank and Scale": [on(LINEAR, low_rank(3), output_scale)],
    "Sparse": [on(LINEAR, sparse(0.05))],
    "Columns": [on(LINEAR, columns(7))],
    "Rows": [on(LINEAR, rows(7))],
    "OneBit": [on(LINEAR, one_bit)],
    "Kronecker": [on(LINEAR, kronecker)],
    "Circulant": [on(LINEAR, circulant(8))],
    "TopK": [on(("q_proj", "down_proj"), top_k(8, 3))],
    "Scale": [on(("k_proj", "v_proj"), output_scale), on(("o_proj", "down_proj"), input_scale)],
    "Scale of a part's input": [on(("k_proj", "up_proj"), input_scale)],
    "Rotate": [on(("q_proj", "v_proj", "o_proj"), rotate(4))],
    "Rotate, far": [on(("o_proj", "gate_proj"), rotate(1 << 20))],
    "Bias": [on(("v_proj", "o_proj", "gate_proj"), bias)],
    "NormWeight": [on(("input_layernorm", "post_attention_layernorm", "norm"), norm_weight)],
    "TokenRows": [on(("embed_tokens", "lm_head"), token_rows(100))],
    "Prefix": [on((MODEL,), prefix(21))],
    "Prompt": [on((MODEL,), prompt(9))],
    "Invocation": [on(LINEAR, low_rank(4)), on((MODEL,), invocation(3))],
}
# By request: adapters and their weights in a sum.
SUMS: Mapping[str, Mapping[str, float]] = {
    "base": {},
    **{name: {name: 1.0} for name in ADAPTERS},
    "a sum": {"Bias": 1.5, "LowRank": 0.5, "Sparse": -0.75},
}
# A batch of these is recorded on a GPU: they change nothing but outputs of linear layers, and are
# read in place.
RECORDABLE = (
    "base", "LowRank", "LowRank, rank 70", "LowRank and Scale", "Sparse", "Columns", "Rows",
    "OneBit", "Bias", "a sum",
)  # fmt: skip
PROMPT_TOKENS = 23
# Less than the prompts have together: some steps prefill and decode.
STEP_TOKENS, BLOCK_SIZE, PAGES = 200, 16, 3000


def made_adapters(layout: BaseLayout) -> dict[str, Adapter]:
    return {
        name: _made(name, parts, layout, seed)
        for seed, (name, parts) in enumerate(ADAPTERS.items())
    }


def greedy_answers(kernels: Kernels, model: ModelConfig, new_tokens: int) -> dict[str, list[int]]:
    """Tokens by request: those of all of SUMS in one batch, and of RECORDABLE in another."""
    layout, floats = base_layout(model, "made"), torch.float32
    packed = {name: pack(one, layout, floats) for name, one in made_adapters(layout).items()}
    config = EngineConfig(
        dtype="float32",
        max_batch_tokens=STEP_TOKENS,
        block_size=BLOCK_SIZE,
        pool_bytes=PAGES * kv_page_bytes(model, BLOCK_SIZE, floats) * model.num_layers,
        prefix_caching=False,
    )
    checkpoint = made_checkpoint(model, torch.device("cpu"), floats)
    loader = MadeAdapters(packed)
    engine = assemble(checkpoint, config, kernels, make_loader=lambda *_: loader)
    engine.start()
    tokens: dict[str, list[int]] = {}
    try:
        called = packed["Invocation"].invocation
        for names, how in ((SUMS, ""), (RECORDABLE, ", among recordable ones")):
            answers: dict[str, _Answer] = {}
            for request in _requests(model, new_tokens, names, called):
                answers[f"{request.request_id}{how}"] = answer = _Answer()
                engine.submit(request, answer.take)
            for key, answer in answers.items():
                answer.wait()
                tokens[key] = answer.tokens
    finally:
        engine.shutdown()
    return tokens


def compare(kernels: Kernels, model: ModelConfig, new_tokens: int) -> list[Figure]:
    """A figure for each answer, and one for all of them."""
    truth = greedy_answers(kernels_for(torch.device("cpu"), torch.float32), model, new_tokens)
    answers = greedy_answers(kernels, model, new_tokens)
    figures = []
    for name, wanted in truth.items():
        same = sum(map(int.__eq__, answers[name], wanted))
        facts = {"same_tokens": same, "tokens": len(wanted), "as_base": wanted == truth["base"]}
        figures.append(
            Figure(f"greedy parity, {name}", agrees=answers[name] == wanted, facts=facts)
        )
    right = sum(bool(figure.agrees) for figure in figures)
    name = f"greedy parity with the CPU in float32: {right} of {len(figures)} answers"
    return [*figures, Figure(name, agrees=right == len(figures), main=True)]


class _Answer(TimedAnswer):
    """With its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def take(self, output: RequestOutput) -> None:
        self.tokens += output.token_ids
        super().take(output)


def _requests(
    model: ModelConfig, new_tokens: int, names: Iterable[str], called: Sequence[int]
) -> Iterator[GenerationRequest]:
    """All with the same prompt, which has what calls an adapter."""
    random = Random(0)
    tokens = [random.randrange(model.vocab_size) for _ in range(PROMPT_TOKENS)]
    tokens[5 : 5 + len(called)] = called
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for name in names:
        yield GenerationRequest(name, tokens, params, _shares(SUMS[name]))


def _shares(weights: Mapping[str, float]) -> Shares:
    return combine(
        Share(AdapterRef(name, 1, Path(name)), weight) for name, weight in weights.items()
    )


def _made(name: str, parts: Sequence[Part], layout: BaseLayout, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Delta, ...]] = {}
    for part in parts:
        for module in (*layout.target_shapes, *layout.norm_sizes, MODEL):
            if module.rpartition(".")[2] in part.modules:
                place = StrongPlace(layout, module, generator, STRENGTH)
                modules[module] = tuple(make(place) for make in part.makes)
    return Adapter(name, 1, name, "MADE", modules)
