"""Variants of PEFT's LoRA, as matrices A and B of a plain one."""

from __future__ import annotations

import torch
from torch import Tensor


def ungroup(a: Tensor, group: int) -> Tensor:
    """QALoRA (arXiv:2309.14717) as PEFT computes it: A reads the means of groups of inputs, times
    the number of groups.

    a: [rank, in / group] -> [rank, in].
    """
    return a.repeat_interleave(group, dim=1) * (a.shape[1] / group)


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """BD-LoRA in PEFT: blocks of equal size, stacked.

    blocks: [rows, columns / count] -> [rows, columns], zero but on the diagonal of blocks.
    """
    matrix: Tensor = torch.block_diag(*blocks.chunk(count))
    return matrix


def without_smallest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """KaSA (arXiv:2412.06071) takes the weight's `rank` smallest singular values for noise, and
    trains over the base without them.

    weight: [out, in], rank below both -> what is taken away, negative, as A `[rank, in]` and B
    `[out, rank]`.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return vh[-rank:], -u[:, -rank:] * s[-rank:]


def dora_gains(magnitude: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353): the changed weight's rows are scaled to trained lengths.

    magnitude: [out], weight and change: [out, in] -> [out].
    """
    lengths: Tensor = torch.linalg.vector_norm(weight + change, dim=1)
    return magnitude / lengths
