"""Answers over compressed and selected KV do not tell what was cached, preempted or computed again.

Of float32 on the plain kernels; what is read is what each format and selection has."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_eviction import NOTED_BYTES
from polydelta.kernels.kv_formats.by_name import FORMATS as FORMATS_BY_NAME
from polydelta.kernels.kv_selection import FULL, H2O, SnapKV, Window, parse_selection
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.reference import ReferenceKernels

FORMATS = ("int8", "fp8", "int4", "kivi-4", "kivi-2", "mustafar-50", "mustafar-70", "gear")
SHARING = ("window:3+17", "quest:24", "infllm:8+16+8")
LAYERS, HEADS, HEAD_DIM = 3, 2, 16
# Of one layer, in float32.
TOKEN_BYTES = 2 * HEADS * HEAD_DIM * 4
# Tokens of the longest prompt and answer.
LONGEST = 190
# Steps have room for a block of XAttention beside the other sequences.
OPTIONS = {"max_batch_size": 9, "max_batch_tokens": 140, "block_size": 4}


@pytest.fixture(scope="module")
def checkpoint(
    default_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """A random model whose heads every format can store."""
    torch.manual_seed(12)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=92,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    files = HfFolder(folder)
    return Checkpoint("tiny", files.config, files, default_checkpoint.tokenizer)


@pytest.fixture
def requests(
    checkpoint: Checkpoint, adapter_writer: Callable
) -> Callable[..., list[GenerationRequest]]:
    """The base and two adapters in turn, greedy; some prompts begin alike."""
    write = adapter_writer(base_layout(checkpoint.config, checkpoint.id))
    write.lora("lora", 5, seed=1, scale=0.3)
    write.shira("shira", 1, targets=("k_proj", "down_proj"), seed=2, scale=0.3)
    root: Path = write.root
    catalog, names = FolderCatalog([root]), (None, "lora", None, "shira", "lora")

    def make(count: int) -> list[GenerationRequest]:
        chance = random.Random(6)
        shared = [chance.randrange(3, 40000) for _ in range(67)]
        made = []
        for number in range(count):
            name = names[number % len(names)]
            own = [chance.randrange(3, 40000) for _ in range(chance.randrange(1, 70))]
            prompt = shared + own if number % 3 else own
            params = SamplingParams(max_tokens=40 + number, temperature=0.0, ignore_eos=True)
            adapters = combine([Share(catalog.resolve(name))] if name else [])
            made.append(GenerationRequest(f"request-{number}", prompt, params, adapters))
        return made

    return make


SETUPS: list[dict[str, Any]] = [
    *({"kv_format": each} for each in FORMATS),
    *({"kv_select": each} for each in (*SHARING, "snapkv:40", "h2o:0.3+0.2")),
    {"prefill": "xattention:8+0.7"},
    {"kv_format": "int8", "kv_select": "window:3+17"},
    {"kv_format": "int4", "kv_select": "quest:24"},
    {"kv_format": "int8", "kv_select": "h2o:0.3+0.2"},
    {"kv_format": "mustafar-50", "kv_select": "snapkv:40"},
    {"kv_select": "quest:24", "prefill": "xattention:8+0.7"},
]
# What others are much like.
LONG: list[dict[str, Any]] = [
    *({"kv_format": each} for each in ("int8", "fp8", "int4", "kivi-4", "kivi-2", "mustafar-70")),
    {"kv_select": "quest:24"},
    {"kv_select": "snapkv:40"},
    {"kv_select": "h2o:0.3+0.2"},
]


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(
            setup, id=", ".join(setup.values()), marks=[pytest.mark.long] * (setup in LONG)
        )
        for setup in SETUPS
    ],
)
def test_answers_do_not_tell_who_was_preempted_or_found_a_prefix(
    setup: dict[str, Any],
    checkpoint: Checkpoint,
    requests: Callable[..., list[GenerationRequest]],
    serve: Callable,
    run: Callable,
) -> None:
    options = OPTIONS | setup
    if "infllm" in setup.get("kv_select", ""):
        options["host_kv_bytes"] = 30 * LAYERS * 4 * TOKEN_BYTES
    # In the order of arrival nobody makes way for others where there is room.
    alone = options | {"prefix_caching": False, "scheduling_policy": "fcfs"}
    with serve(checkpoint, **alone) as engine:
        expected = {name: one.token_ids for name, one in run(engine, requests(13)).items()}
        stats = engine.stats()
        by_page = FORMATS_BY_NAME[engine.kv_setup.format]().by_page
    assert stats.preemptions == 0
    # Room for the adapters and two of the longest sequences, beside what is not a page yet.
    pages = 30 + 2 * -(-LONGEST // stats.block_size)
    opened = (options["max_batch_size"] + 1) * stats.block_size * TOKEN_BYTES if by_page else 0
    crowded = LAYERS * (pages * options["block_size"] * TOKEN_BYTES + opened)
    with serve(checkpoint, pool_bytes=crowded, max_model_len=LONGEST, **options) as engine:
        # Twice: the second time prompts are there, as far as others may find them.
        run(engine, requests(13))
        got = {name: one.token_ids for name, one in run(engine, requests(13)).items()}
        stats = engine.stats()
    assert got == expected
    # Of those that hold no more with every token, nobody makes way.
    selection = engine.kv_setup.selection
    assert stats.preemptions > 0 or isinstance(selection, Window | H2O)
    # What blocks of 128 tokens choose is found by longer prompts.
    shares = "prefill" not in setup and not isinstance(selection, SnapKV | H2O)
    assert (stats.prefix_hits > 0) == shares


@pytest.mark.parametrize("kv_format", ["native", "int8"])
def test_a_prompt_of_several_blocks_is_found_by_xattention(
    kv_format: str, checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    chance = random.Random(3)
    prompt = [chance.randrange(3, 40000) for _ in range(311)]
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    asked = [GenerationRequest(name, prompt, params) for name in ("cold", "warm")]
    # A mass that block 0 and the own one always have.
    options = OPTIONS | {"prefill": "xattention:8+0.01", "kv_format": kv_format, "block_size": 8}
    with serve(checkpoint, **options) as engine:
        cold, warm = (run(engine, [each])[each.request_id].token_ids for each in asked)
        # Where a page ends with a block: of 8 tokens, or of int8's 28 never.
        assert engine.stats().prefix_hits == (256 if kv_format == "native" else 0)
    with serve(checkpoint, prefix_caching=False, **options | {"prefill": "full"}) as engine:
        dense = run(engine, asked[:1])["cold"].token_ids
    assert cold == warm != dense


@pytest.mark.parametrize(
    "setup",
    [
        {"kv_select": "quest:24"},
        {"kv_format": "int4", "kv_select": "quest:24", "host_kv_bytes": 1 << 20},
        {"kv_format": "kivi-2", "host_kv_bytes": 1 << 20},
    ],
    ids=lambda setup: ", ".join(map(str, setup.values())),
)
def test_small_steps_in_bfloat16_compute_again_what_was_there(
    setup: dict[str, Any],
    checkpoint: Checkpoint,
    requests: Callable[..., list[GenerationRequest]],
    serve: Callable,
    run: Callable,
) -> None:
    """Steps of so few tokens are recorded, and answers come again a few at a time."""
    options = OPTIONS | setup | {"max_batch_tokens": 16, "dtype": "bfloat16"}
    token_bytes = TOKEN_BYTES // 2
    with serve(checkpoint, prefix_caching=False, **options) as engine:
        expected = {name: one.token_ids for name, one in run(engine, requests(13)).items()}
        size = engine.stats().block_size
        by_page = FORMATS_BY_NAME[engine.kv_setup.format]().by_page
    opened = (options["max_batch_size"] + 1) * size * token_bytes if by_page else 0
    pages = 30 + 2 * -(-LONGEST // size)
    crowded = LAYERS * (pages * options["block_size"] * token_bytes + opened)
    with serve(checkpoint, pool_bytes=crowded, max_model_len=LONGEST, **options) as engine:
        got = {name: one.token_ids for name, one in run(engine, requests(13)).items()}
        assert engine.stats().preemptions > 0
    assert got == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_with_selections_of_their_own_answer_as_alone(
    dtype: str,
    checkpoint: Checkpoint,
    requests: Callable[..., list[GenerationRequest]],
    serve: Callable,
    run: Callable,
) -> None:
    """In bfloat16 a step is recorded for some mix of them, and replayed for others."""
    names = ("full", "window:2+30", "quest:16", "snapkv:50", "h2o:0.3+0.2")
    ways, options = [parse_selection(name) for name in names], OPTIONS | {"dtype": dtype}
    with serve(checkpoint, kv_select="quest:40", prefix_caching=False, **options) as engine:
        expected: dict[str, list[int]] = {}
        for request in requests(12):
            kv_select = ways[int(request.request_id.split("-")[1]) % len(ways)]
            alone = replace(request, kv_select=kv_select)
            expected |= {n: one.token_ids for n, one in run(engine, [alone]).items()}
    with serve(checkpoint, kv_select="quest:40", **options) as engine:
        together = [
            replace(each, kv_select=ways[number % len(ways)])
            for number, each in enumerate(requests(12))
        ]
        for _ in range(2):
            got = {name: one.token_ids for name, one in run(engine, together).items()}
            assert got == expected
    assert len({tuple(each) for each in expected.values()}) == len(expected)


class RecordingKernels(ReferenceKernels):
    """Would record steps of one row or two, if any of its steps could be."""

    def recorded_rows(self, rows: int) -> int | None:
        return rows if rows <= 2 else None

    def sizes_to_record(self, most_rows: int) -> tuple[int, ...]:
        return 2, 1


@pytest.mark.parametrize(
    ("setup", "decoded", "prompts"),
    [
        ({}, [], []),
        ({"kv_select": "quest:24"}, ["quest:24"], ["full"]),
        ({"kv_format": "int4", "kv_select": "quest:24"}, ["quest:24"], ["full"]),
        ({"kv_select": "h2o:0.3+0.2"}, [], ["h2o:0.3+0.2"]),
        ({"kv_format": "mustafar-50", "kv_select": "snapkv:40"}, ["full"], ["full", "snapkv:40"]),
        ({"kv_format": "int8", "prefill": "xattention"}, ["full"], ["full", "xattention:8+0.9"]),
    ],
)
def test_steps_that_cannot_be_recorded_run_once_ahead(
    setup: dict[str, Any],
    decoded: list[str],
    prompts: list[str],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all that becomes of a page that is full."""
    attended, seen = KVAttention._attended, []

    def noted(self: KVAttention, part: SequenceSlice, layer: int, *rest: Any) -> Tensor:
        if layer == LAYERS - 1:
            seen.append((str(part.selection), part.length, part.context))
        return attended(self, part, layer, *rest)

    monkeypatch.setattr(KVAttention, "_attended", noted)
    config = EngineConfig(dtype="float32", pool_bytes=1 << 20, **OPTIONS | setup)
    engine = assemble(checkpoint, config, RecordingKernels())
    size = engine.stats().block_size
    single = [(name, context) for name, length, context in seen if length == 1]
    # Of two rows and of one, without an adapter and with one.
    contexts = [size, 1, size, 1, size, size]
    assert single == [(name, context) for name in decoded for context in contexts]
    assert list(dict.fromkeys(name for name, length, _ in seen if length > 1)) == prompts
    attentions = engine._runner._kv._attentions.values()
    assert not any(attention._eviction._sequences for attention in attentions)


def test_nothing_is_kept_of_sequences_that_have_left(
    checkpoint: Checkpoint, requests: Callable, serve: Callable, run: Callable
) -> None:
    """Beside the pool; whether they ended or were preempted, from the next step on."""
    with serve(checkpoint, **OPTIONS, kv_select="h2o:0.3+0.2") as engine:
        run(engine, requests(5))
        (attention,) = engine._runner._kv._attentions.values()
        assert attention._eviction._sequences
        run(engine, [replace(requests(1)[0], kv_select=parse_selection("full"))])
        assert not attention._eviction._sequences


def test_the_pool_pays_for_what_h2o_notes_of_tokens(checkpoint: Checkpoint) -> None:
    full, noting = (
        KVSpec.of(checkpoint.config, torch.float32, 4, selection=selection)
        for selection in (FULL, H2O())
    )
    page = LAYERS * (full.page_bytes + 4 * HEADS * NOTED_BYTES)
    assert noting.page_bytes == full.page_bytes
    assert noting.pages_in(9 * page, 1) == 9
    assert noting.pages_in(9 * page - 1, 1) == 8


def test_a_window_serves_prompts_that_are_longer_than_the_pool(
    checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    chance = random.Random(4)
    prompt = [chance.randrange(3, 40000) for _ in range(303)]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    request = GenerationRequest("long", prompt, params)
    options = OPTIONS | {"kv_select": "window:3+29"}
    with serve(checkpoint, **options) as engine:
        expected = run(engine, [request])["long"].token_ids
    # Room for 160 tokens.
    with serve(checkpoint, pool_bytes=160 * LAYERS * TOKEN_BYTES, **options) as engine:
        assert engine.max_model_len == 512
        assert run(engine, [request])["long"].token_ids == expected
