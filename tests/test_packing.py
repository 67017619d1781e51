"""The packed form: round trip, bit order, damaged input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mendlm.errors import CheckpointError
from mendlm.packing import check_packed, half_of, pack_mask, unpack, unpack_mask


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))


@given(mask=masks(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_unpacking_undoes_packing(mask: torch.Tensor, dtype: torch.dtype) -> None:
    dense = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).to(dtype) * mask
    bitmask = pack_mask(mask)
    np.testing.assert_array_equal(bitmask.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_mask(bitmask, mask.shape[1]), mask)
    assert torch.equal(unpack(dense[mask], bitmask, mask.shape[1]), dense)


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, ::3] = True
    return torch.arange(12.0), pack_mask(mask)


def test_a_flipped_bit_is_found() -> None:
    values, bitmask = packed()
    bitmask[1, 0] ^= 1
    with pytest.raises(CheckpointError, match="marks 11 entries as kept but there are 12 values"):
        unpack(values, bitmask, 10)


def test_a_set_padding_bit_is_found() -> None:
    values, bitmask = packed()
    bitmask[2, 1] |= 0x80
    with pytest.raises(CheckpointError, match="padding bit"):
        check_packed(values, bitmask, 10)


def test_wrong_shapes_are_found() -> None:
    values, bitmask = packed()
    with pytest.raises(CheckpointError, match="2 bytes a row, 20 columns need 3"):
        check_packed(values, bitmask, 20)
    with pytest.raises(CheckpointError, match="1-D values and a 2-D uint8 bitmask"):
        check_packed(values[None], bitmask, 10)
    with pytest.raises(CheckpointError, match="1-D values and a 2-D uint8 bitmask"):
        check_packed(values, bitmask.int(), 10)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0b0011_0101, 0b1010_1100], 4),  # two of every four
        ([0b0011_0101, 0b0111_0001], 8),  # four of eight
        ([0b0011_0101, 0b0111_0011], 0),
        ([0b0000_0000, 0b0000_0000], 0),
        ([], 0),
    ],
)
def test_which_half_is_kept(rows: list[int], expected: int) -> None:
    assert half_of(torch.tensor(rows, dtype=torch.uint8).reshape(-1, 1)) == expected


def test_columns_beyond_the_last_byte_are_not_kept() -> None:
    assert half_of(pack_mask(torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.bool))) == 0
