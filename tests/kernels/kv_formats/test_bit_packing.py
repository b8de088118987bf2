from __future__ import annotations

import pytest
import torch

from polydelta.kernels.kv_formats.bit_packing import pack, unpack


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(8,), (3, 40), (2, 1, 5, 72)], ids=str)
def test_numbers_come_back_from_their_bits(bits: int, size: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, size, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*size[:-1], size[-1] * bits // 8)
    assert unpack(packed, bits).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_first_number_of_a_byte_is_in_its_lowest_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (24,), generator=torch.Generator().manual_seed(bits))
    for place, code in enumerate(codes.tolist()):
        byte = int(pack(codes, bits)[place * bits // 8])
        assert (byte >> (place * bits % 8)) % 2**bits == code


def test_codes_of_floats_are_packed_as_they_are() -> None:
    assert pack(torch.tensor([3.0, 15.0, 0.0, 9.0]), 4).tolist() == [0xF3, 0x90]
