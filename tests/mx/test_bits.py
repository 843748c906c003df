"""Packing of codes into bytes: by hand, by integer arithmetic, and there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile.mx import pack_codes, packed_bytes, unpack_codes


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, (0x1, 0x2), (0x21,)),
        (4, (0xF, 0x0, 0x0, 0xA), (0x0F, 0xA0)),
        (6, (0x3F, 0, 0, 0), (0x3F, 0x00, 0x00)),
        (6, (0, 0x3F, 0, 0), (0xC0, 0x0F, 0x00)),
        (6, (0, 0, 0x3F, 0), (0x00, 0xF0, 0x03)),
        (6, (0, 0, 0, 0x3F), (0x00, 0x00, 0xFC)),
        (6, (0x01, 0x02, 0x03, 0x04), (0x81, 0x30, 0x10)),
        (8, (0xAB, 0xCD), (0xAB, 0xCD)),
    ],
)
def test_by_hand(bits, codes, packed):
    assert torch.equal(pack_codes(u8(*codes), bits), u8(*packed))
    assert torch.equal(unpack_codes(u8(*packed), bits), u8(*codes))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_is_little_endian_and_contiguous(bits):
    codes = torch.randint(0, 1 << bits, (96,), generator=torch.Generator().manual_seed(bits))
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    packed = pack_codes(codes.to(torch.uint8), bits)
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(96, bits), "little")


@given(
    bits=st.sampled_from([4, 6, 8]),
    shape=st.lists(st.integers(0, 3), max_size=2),
    groups=st.integers(0, 9),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_there_and_back(bits, shape, groups, transposed):
    n = groups * {4: 2, 6: 4, 8: 1}[bits]
    full = (n, *shape) if transposed else (*shape, n)
    codes = torch.randint(0, 1 << bits, full, dtype=torch.uint8)
    codes = codes.movedim(0, -1) if transposed else codes
    packed = pack_codes(codes, bits)
    assert packed.shape == (*codes.shape[:-1], n * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_refuses_what_does_not_fit():
    for bits, count in ((4, 3), (6, 6)):
        with pytest.raises(ValueError, match="groups"):
            pack_codes(torch.zeros(count, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="3 bytes"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 6)
    for function in (pack_codes, unpack_codes):
        with pytest.raises(ValueError, match="4, 6 or 8"):
            function(torch.zeros(8, dtype=torch.uint8), 5)
