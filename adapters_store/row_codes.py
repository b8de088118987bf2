"""Rows of a matrix in 8 or 4 bits, as kernels read them in place."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError

# Columns of a row that share a scale.
GROUP = 32
# Bits that there are.
BITS = (8, 4)
# Larger numbers would need scales beyond float16.
_MOST = 2.0**18
# Of the scale that just holds a group's largest number, in 4 bits; clipping it loses less than the
# finer steps gain. Each is then fitted once to the codes that it gives. Normal numbers are off by
# 8.2 %; with 1 alone, as it is, by 8.6 %, with 25 of them fitted twice by 8.1 % in ten times the
# time.
_SHARES = (1.0, 0.9, 0.8)
# Groups whose numbers stay in a cache while they are fitted.
_AT_ONCE = 4096


def quantize_rows(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`[rows, columns]` of any float dtype -> codes and scales; a number is about their product.

    Codes of 8 bits: `[rows, columns]` int8, -127 to 127. Of 4 bits: -8 to 7, to which 8 is added,
    in `[rows, columns / 2 rounded up]` uint8, an even column in the lower half of its byte. Scales:
    `[rows, groups]` float16, one for each GROUP columns. In 4 bits a scale may be negative:
    the largest number has the code -8, which has no positive counterpart.

    Raises InvalidAdapterError for numbers that scales in float16 cannot hold.
    """
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.float(), (0, -columns % GROUP))
    # Not `>`: a NaN is neither.
    if not padded.abs().amax() <= _MOST:
        raise InvalidAdapterError(
            f"Low-rank matrices have numbers that are not finite, or beyond {_MOST:.0f}, which "
            f"{bits} bits do not hold: serve the adapter without --adapter-bits."
        )
    fit = _fit_8 if bits == 8 else _fit_4
    parts = [fit(part) for part in padded.view(-1, GROUP).split(_AT_ONCE)]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    codes = codes.view(rows, -1)
    if bits == 8:
        return codes[:, :columns].to(torch.int8), scales.view(rows, -1)
    halves = (codes + 8).to(torch.uint8)
    return (halves[:, ::2] | halves[:, 1::2] << 4)[:, : -(-columns // 2)], scales.view(rows, -1)


def balanced(a: Tensor, b_t: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of a `[rank, in]` and b_t `[rank, out]`, float32: of each rank the largest
    numbers of both are within a factor of 2. A and B of an adapter may be far apart, and scales of
    the smaller one too small for float16. Factors are powers of two, so nothing is rounded."""
    a, b_t = a.float(), b_t.float()
    of_a, of_b = a.abs().amax(1), b_t.abs().amax(1)
    apart = torch.where((of_a > 0) & (of_b > 0), of_b.log2() - of_a.log2(), 0)
    halfway = (apart / 2).round().int().unsqueeze(1)
    return a.ldexp(halfway), b_t.ldexp(-halfway)


def _fit_8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: `[n, GROUP]` float32 -> codes like them, scales `[n]` float16."""
    scales = (groups.abs().amax(1, keepdim=True) / 127).half()
    return _codes(groups, scales.float(), -127, 127), scales.squeeze(1)


def _fit_4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As `_fit_8`; the scale is the one with the least squared error of those that are tried."""
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    errors = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(groups), torch.zeros_like(largest)
    for share in _SHARES:
        first = _codes(groups, largest * (share / -8), -8, 7)
        spread = first.square().sum(1, keepdim=True).clamp(min=1)
        # Rounded first, so that the codes are chosen for the scale that is stored.
        fitted = ((first * groups).sum(1, keepdim=True) / spread).half().float()
        again = _codes(groups, fitted, -8, 7)
        error = (again * fitted - groups).square().sum(1, keepdim=True)
        better = error < errors
        errors = torch.where(better, error, errors)
        codes, scales = torch.where(better, again, codes), torch.where(better, fitted, scales)
    return codes, scales.squeeze(1).half()


def _codes(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """The nearest whole numbers; about 0 where the scale is 0."""
    return (groups / torch.where(scales == 0, 1.0, scales)).round().clamp(least, most)
