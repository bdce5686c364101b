"""The hash of tensors changes with every flipped bit and with every change of order."""

import pytest
import torch
from torch import Tensor

from launcher.parallel import digest as module
from launcher.parallel.digest import digest

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 1, 3), (0,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("chunk", [4, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_flipped_bit_changes_the_hash(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", chunk)
    held = tensors(dtype)
    before, hashes = int(digest(held)), set()
    for tensor in held:
        bits = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
        for index in range(bits.numel()):
            for bit in range(8 * tensor.element_size()):
                top = bit == 8 * tensor.element_size() - 1
                flip = -(1 << bit) if top else 1 << bit
                bits[index] ^= flip
                hashes.add(int(digest(held)))
                bits[index] ^= flip
    flips = sum(8 * tensor.element_size() * tensor.numel() for tensor in held)
    assert len(hashes - {before}) == flips
    assert int(digest(held)) == before


def test_two_flipped_signs_do_not_cancel() -> None:
    x = torch.randn(1000)
    assert len({int(digest([each])) for each in (x, -x, x.double(), -x.double())}) == 4


def test_order_and_zeros_count() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert int(digest([a, b])) != int(digest([b, a]))
    assert int(digest([a])) != int(digest([a.flip(0)]))
    assert int(digest([torch.zeros(3)])) != int(digest([-torch.zeros(3)]))
    assert int(digest([torch.zeros(3)])) != 0


def test_layout_in_memory_does_not_count() -> None:
    whole = torch.randn(4, 6)
    assert int(digest([whole[1:, ::2]])) == int(digest([whole[1:, ::2].clone()]))
    assert int(digest([whole.t()])) == int(digest([whole.t().contiguous()]))


def test_nothing_is_changed() -> None:
    x = torch.arange(10)
    digest([x, x])
    assert x.tolist() == list(range(10))
