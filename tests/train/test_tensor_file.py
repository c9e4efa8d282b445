"""The checksum by which ranks compare their weights."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from raybert.train.tensor_file import DTYPES, checksum_tensors

_SHAPES = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def drawn(draw):
    """Tensors of any types and shapes, one of which has a bit to flip."""
    made = []
    for seed in range(draw(st.integers(1, 4))):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES, key=str))), draw(_SHAPES)
        torch.manual_seed(seed)
        made.append((10 * torch.randn(shape)).to(dtype))
    return made


@given(drawn(), st.data())
def test_any_changed_bit_changes_the_checksum(tensors, data):
    before = checksum_tensors(tensors)
    assert checksum_tensors([tensor.clone() for tensor in tensors]) == before
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return
    bits = data.draw(st.sampled_from(filled)).view(-1).view(torch.uint8)
    at = data.draw(st.integers(0, len(bits) - 1))
    bits[at] ^= 1
    assert checksum_tensors(tensors) != before


def test_the_order_of_tensors_changes_the_checksum():
    one, other = torch.ones(3), torch.zeros(3)
    assert checksum_tensors([one, other]) != checksum_tensors([other, one])


def test_a_part_of_a_tensor_has_the_checksum_of_its_copy():
    whole = torch.randn(9)
    for begin in range(3):
        part = whole[begin : begin + 4]
        assert checksum_tensors([part]) == checksum_tensors([part.clone()])
