"""A 64-bit hash of tensors, computed on their device, that changes with every flipped bit.

Words w of 8, 16 or 32 bits, read as signed integers, are hashed modulo 2**64: each chunk to sum(w[i] * m[i])
with odd multipliers m, and the chunks by Horner's rule with an odd base. A flipped bit changes a word by a
power of two below 2**32, and an odd factor never turns that into zero. Words of 64 bits would: two flipped
top bits would cancel, because 2**63 times any odd number is 2**63.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_BASE = 6364136223846793005  # Knuth's multiplier for a linear congruential generator
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes per element

# Words hashed at a time. On CPU the widened words stay in the cache: on one core 2.4 GB/s, and half of that
# with 2**20. A GPU needs enough work per kernel.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 20}


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the hash of the tensors' bits, in their order, as an int64 scalar on the last tensor's device.

    Needs a few MB of temporary memory, whatever the size of the tensors.
    """
    total, multipliers = torch.ones((), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for words in _chunks(tensors):
        if len(multipliers) < len(words) or multipliers.device != words.device:
            multipliers = _multipliers(len(words), words.device)
        chunk = words.to(torch.int64, copy=True).mul_(multipliers[: len(words)])
        total = total.to(words.device) * _BASE + chunk.sum()
    return total


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors' words: large tensors in pieces, small tensors of a device and dtype joined."""
    pieces: list[Tensor] = []
    held = 0
    for tensor in tensors:
        words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
        size = _CHUNK[words.device.type]
        for piece in words.split(size):
            is_alike = not pieces or (pieces[0].device, pieces[0].dtype) == (piece.device, piece.dtype)
            if not is_alike or held + len(piece) > size:
                yield torch.cat(pieces)
                pieces, held = [], 0
            pieces.append(piece)
            held += len(piece)
    if pieces:
        yield torch.cat(pieces)


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Return `count` odd 64-bit numbers, the same on every device: the output function of SplitMix64."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1
