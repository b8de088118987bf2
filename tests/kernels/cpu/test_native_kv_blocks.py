"""Prompts that read blocks of their context, in our own C: the choice and the attention, against
torch's over the same pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary, NativePool
from polydelta.kernels.cpu.native_kv import NativeKVAttention
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_prefill import _block_scores, block_mask
from polydelta.kernels.kv_selection import FULL, Selection, Window, XAttention
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]

BLOCK = 128
# Sums of one choice by us and by torch differ by less: those that are nearer to the threshold may
# be decided otherwise.
ROUNDING = 2e-3


@pytest.fixture(scope="module", params=[1, 3])
def pool(decoder_library: NativeLibrary, request: pytest.FixtureRequest) -> NativePool:
    return decoder_library.open_pool(request.param)


@pytest.fixture
def trial(pool: NativePool, kv_trial: Trial) -> Trial:
    """Sequences whose queries look for something: the attention of random ones is alike."""

    def ours(kind: KVKind, device: torch.device) -> KVAttention:
        return NativeKVAttention(kind, pool, 3)

    def make(format: str, lengths: Sequence[int], factor: float = 2.0, **more: Any) -> Any:
        more |= {"dtype": torch.bfloat16, "query_dtype": torch.bfloat16}
        trial = kv_trial(format, lengths, attention=ours, **more)
        for queries in trial.queries:
            queries *= factor
        return trial

    return make


def run(trial: Any, number: int, selection: Selection, ends: Sequence[int]) -> Tensor:
    outs, first = [], 0
    for last in ends:
        outs += trial.step([(number, first, last, selection)])
        first = last
    return torch.cat(outs)


def asked(trial: Any, number: int, selection: XAttention) -> tuple[Any, ...]:
    """What torch's functions want to know of a whole prompt."""
    queries = trial.queries[number].float()
    part = SequenceSlice(0, len(queries), len(queries), trial.pages[number], selection)
    load = partial(trial.attention.load, trial.memory, part)
    return selection, trial.kind.shape, part, queries, load


def attended(trial: Any, number: int, wanted: Tensor) -> Tensor:
    """`[length, heads, head_dim]` float64, of queries that read these blocks, `[heads, blocks,
    blocks]`."""
    queries = trial.queries[number].double()
    length = len(queries)
    keys, values = trial.stored(number, length - 1)
    group = trial.kind.shape.num_heads // trial.kind.shape.num_kv_heads
    reads = wanted.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    reads = reads & torch.ones(length, length, dtype=torch.bool).tril()
    keys, values = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (keys, values))
    scores = queries.transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(queries.shape[2])
    return (scores.masked_fill(~reads, -math.inf).softmax(-1) @ values).transpose(0, 1)


def name_blocks(trial: Any) -> None:
    """Values from which an answer tells what was read: in block i, 1 in channel i and else 0."""
    for values in trial.values:
        blocks = torch.arange(len(values)) // BLOCK
        names = torch.nn.functional.one_hot(blocks, values.shape[-1]).to(values.dtype)
        values.copy_(names[:, None].expand_as(values))


def read_blocks(out: Tensor) -> Tensor:
    """Of such values: `[heads, query blocks, key blocks]` bool."""
    blocks = [part.ne(0).any(0) for part in out.split(BLOCK)]
    return torch.stack(blocks, 1)[..., : len(blocks)]


def assert_chosen(trial: Any, number: int, selection: XAttention, chosen: Tensor) -> None:
    """All that torch chooses, but for blocks that are as good as others, or as none."""
    scores = _block_scores(*asked(trial, number, selection))
    wanted = block_mask(*asked(trial, number, selection))
    differ = (wanted != chosen).any(-1)
    assert differ.sum() <= 0.02 * differ.numel()
    for head, own in differ.nonzero().tolist():
        row = scores[head, own]
        missing = [
            selection.threshold * row.sum() - row[each[head, own]].sum()
            for each in (wanted, chosen)
        ]
        assert abs(missing[0] - missing[1]) < ROUNDING or max(missing).abs() < ROUNDING, (head, own)


CASES = [(8, 0.9, 1300), (16, 0.5, 640), (128, 0.7, 1027), (4, 0.1, 520), (1, 0.4, 600)]


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize("shape", [(3, 1, 16), (9, 3, 64), (4, 4, 40), (33, 1, 12)], ids=str)
@pytest.mark.parametrize(("stride", "threshold", "length"), CASES)
def test_blocks_are_chosen_as_torch_does(
    trial: Trial,
    format: str,
    shape: tuple[int, int, int],
    stride: int,
    threshold: float,
    length: int,
) -> None:
    heads, kv_heads, head_dim = shape
    selection = XAttention(stride, threshold)
    ours = trial(format, [length], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    name_blocks(ours)
    chosen = read_blocks(run(ours, 0, selection, [length]))
    assert_chosen(ours, 0, selection, chosen)
    assert not chosen.triu(1).any()
    assert not torch.equal(chosen, torch.ones_like(chosen).tril())


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize("shape", [(3, 1, 16), (9, 3, 64), (5, 5, 40), (2, 1, 256)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 128, 129, 387, 516, 901])
def test_queries_attend_to_what_they_choose(
    trial: Trial, near: Near, format: str, shape: tuple[int, int, int], length: int
) -> None:
    heads, kv_heads, head_dim = shape
    selection = XAttention(8, 0.6)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": 7}
    named = trial(format, [length], **sizes)
    name_blocks(named)
    wanted = read_blocks(run(named, 0, selection, [length]))
    ours = trial(format, [length], **sizes)
    near(run(ours, 0, selection, [length]), attended(ours, 0, wanted), torch.bfloat16)


@pytest.mark.parametrize("ends", [[128, 256, 512, 700], [384, 700], [640, 700]], ids=str)
@pytest.mark.parametrize("format", ["native", "int8"])
def test_how_a_prompt_is_cut_changes_no_bit(trial: Trial, format: str, ends: list[int]) -> None:
    selection = XAttention(16, 0.7)
    ours = trial(format, [700], heads=6, kv_heads=2, head_dim=24)
    whole = run(ours, 0, selection, [700])
    assert torch.equal(run(ours, 0, selection, ends), whole)


@pytest.mark.parametrize("format", ["native", "int8"])
def test_a_threshold_of_one_is_full_attention(trial: Trial, near: Near, format: str) -> None:
    # So sharp that most blocks get nothing that can be told from 0.
    ours = trial(format, [450], 300.0, heads=4, kv_heads=2, head_dim=16)
    full = run(ours, 0, FULL, [128, 450])
    near(run(ours, 0, XAttention(8, 1.0), [128, 450]), full, torch.bfloat16)
    mild = trial(format, [450], 1.0, heads=4, kv_heads=2, head_dim=16)
    name_blocks(mild)
    chosen = read_blocks(run(mild, 0, XAttention(8, 1.0), [128, 450]))
    assert torch.equal(chosen, torch.ones_like(chosen).tril())


def test_block_zero_and_the_queries_own_are_read_in_any_case(trial: Trial) -> None:
    ours = trial("native", [900], 1.0, heads=2, kv_heads=1, head_dim=8)
    name_blocks(ours)
    chosen = read_blocks(run(ours, 0, XAttention(8, 1e-9), [256, 900]))
    only = torch.eye(8, dtype=torch.bool)
    only[:, 0] = True
    assert torch.equal(chosen, only.expand(2, -1, -1))


def test_prompts_and_others_share_a_step(trial: Trial, near: Near) -> None:
    narrow, wide, window = XAttention(32, 0.5), XAttention(8, 0.95), Window(4, 30)
    ours = trial("int8", [300, 40, 460, 90], heads=4, kv_heads=2, head_dim=8)
    early = [(1, 0, 39, FULL), (0, 0, 256, FULL), (2, 0, 128, FULL), (3, 0, 80, FULL)]
    parts = [(3, 80, 90, window), (0, 256, 300, narrow), (1, 39, 40, FULL), (2, 128, 460, wide)]
    ours.step(early)
    together = ours.step(parts)
    for part, out in zip(parts, together, strict=True):
        assert torch.equal(ours.step([part])[0], out)
    full = torch.ones(4, 1, 1, dtype=torch.bool)
    near(together[2], attended(ours, 1, full)[39:], torch.bfloat16)


def test_a_layer_with_a_window_reads_its_window(trial: Trial) -> None:
    ours = trial("native", [300], window=50)
    full = run(ours, 0, FULL, [300])
    assert torch.equal(run(ours, 0, XAttention(8, 0.1), [300]), full)


def test_a_prompt_that_goes_on_inside_of_a_block_is_refused(trial: Trial) -> None:
    ours = trial("native", [300])
    ours.step([(0, 0, 130, FULL)])
    with pytest.raises(ValueError, match="cannot begin at position 130"):
        ours.step([(0, 130, 300, XAttention())])


def test_such_a_step_is_not_recorded(trial: Trial) -> None:
    ours = trial("native", [256])
    of = {"start": 0, "length": 128, "context": 128, "pages": ours.pages[0]}
    assert ours.attention.plan([SequenceSlice(**of)]).recordable
    assert not ours.attention.plan([SequenceSlice(**of, selection=XAttention())]).recordable
