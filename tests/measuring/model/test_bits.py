import torch

from ib_callback.measuring.model.bits import checksums, is_plain, same_bits


def test_bits_are_those_of_the_values_wherever_they_lie():
    whole = torch.randn(65)
    part = whole[1:]
    assert same_bits(part, part.clone())
    assert checksums([part, torch.zeros(0)]) == [*checksums([part.clone()]), 0]


def test_the_sign_of_a_zero_and_the_kind_of_a_nan_are_bits():
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    kinds = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert same_bits(kinds[:1], kinds[:1].clone())
    assert not same_bits(kinds[:1], kinds[1:])


def test_what_is_not_plain():
    tensors = (
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8),
    )
    assert not any(map(is_plain, tensors))
    assert is_plain(torch.ones(()))
