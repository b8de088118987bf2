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
ROUNDING = 1e-4


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
    for head, own in (wanted != chosen).any(-1).nonzero().tolist():
        row = scores[head, own]
        few, many = sorted((chosen[head, own], wanted[head, own]), key=lambda each: int(each.sum()))
        missing = selection.threshold * row.sum() - row[few].sum()
        same = few.sum() == many.sum() and (row[few].sum() - row[many].sum()).abs()
        assert same is not False and same < ROUNDING or abs(missing) < ROUNDING, (head, own)


CASES = [(8, 0.9, 1300), (16, 0.5, 640), (128, 0.7, 1027), (4, 0.1, 520), (2, 0.8, 300)]


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize("shape", [(3, 1, 16), (9, 3, 64), (4, 4, 40)], ids=str)
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
    assert chosen.sum() < chosen.tril().numel() and not chosen.triu(1).any()
