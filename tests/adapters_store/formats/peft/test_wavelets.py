from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet, wavelist

from polydelta.adapters_store.formats.peft.wavelets import FILTERS, reconstruct


def test_there_are_filters_of_all_wavelets_that_peft_can_run() -> None:
    runs = {
        wavelet
        for wavelet, (margin, _) in WAVELET_REDUCTIONS.items()
        if wavelet in wavelist() and margin == len(Wavelet(wavelet).rec_lo) - 2
    }
    assert FILTERS.keys() == runs


@pytest.mark.parametrize("wavelet", FILTERS)
def test_filters_are_those_of_peft(wavelet: str) -> None:
    assert FILTERS[wavelet] == pytest.approx(Wavelet(wavelet).rec_lo, abs=1e-11)


@pytest.mark.parametrize("wavelet", sorted(FILTERS.keys() - {"coif4"}))
def test_filters_are_orthonormal_to_their_even_shifts(wavelet: str) -> None:
    taps = FILTERS[wavelet]
    assert sum(taps) == pytest.approx(math.sqrt(2), abs=1e-10)
    for shift in range(0, len(taps), 2):
        product = sum(a * b for a, b in zip(taps[shift:], taps, strict=False))
        assert product == pytest.approx(float(shift == 0), abs=1e-10)


def test_of_a_haar_wavelet_a_coefficient_is_a_square_of_four_entries() -> None:
    coefficients = torch.zeros(6, 4)
    # Low along the rows' axis and high along the columns': second square down, first across.
    coefficients[1, 2] = 1
    expected = torch.zeros(6, 4)
    expected[2:4, 0], expected[2:4, 1] = 0.5, -0.5
    torch.testing.assert_close(reconstruct(coefficients, "db1"), expected)
