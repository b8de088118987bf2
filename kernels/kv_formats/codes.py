"""Codes of a few bits for numbers that share a range, as several formats have them.

All is done number by number or by the least and the most of some, in float32 and nearest-even: the
same bytes on every device and in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that share a scale, where it is not a whole row's.
GROUP = 32
# The largest number of float16.
MOST = 65504.0


def finite(values: Tensor) -> Tensor:
    """What is not finite as 0: one token's overflow is not spread over those that it shares scales
    or factors with."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def half(values: Tensor) -> Tensor:
    """float16, what it cannot hold as the largest number that it can."""
    return values.clamp(-MOST, MOST).half()


def steps(scales: Tensor) -> Tensor:
    """float16 scales in float32, to divide by. Where one is 0 all codes come out as 0."""
    wide = scales.float()
    return wide.where(wide > 0, torch.inf)


def ranged(values: Tensor, least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes between the least and the most of the numbers that share them (KIVI's
    arXiv:2402.02750).

    values: float32; least, most: like them or broadcast over them -> codes like the values,
    float32; scale and zero `[2, *least.shape]` float16: a number is `code * scale + zero`.
    """
    highest = float((1 << bits) - 1)
    # In shares, as the difference of two numbers may be beyond float32.
    scales = torch.stack((most / highest - least / highest, least)).clamp(-MOST, MOST).half()
    codes = ((values - scales[1].float()) / steps(scales[0])).round_().clamp_(0.0, highest)
    return codes, scales
