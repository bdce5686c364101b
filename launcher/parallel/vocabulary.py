"""Sizes of the vocabulary on a tensor rank: its padding, and the chunks of its logits. Without torch."""

from math import ceil


def padded_length(length: int, ranks: int, multiple: int = 1) -> int:
    """Return the smallest length, at least `length`, that gives each rank a multiple of `multiple`."""
    unit = ranks * multiple
    return -(-length // unit) * unit


# A chunk adds its product to the gradient of the whole head weight: V x H numbers are read and written again,
# 8 bytes each in fp32, 12 with a bf16 product between. The three products of n tokens take 6 n V H FLOPs. A
# chunk costs 5% more than its products if n = 20 x 8 / 6 x (FLOPs per byte): 500 at the 18 FLOPs per byte of
# two CPU cores, 8000 at the 200 of an H100.
CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
# A large vocabulary gets smaller chunks. So the logits take at most 128 MB on CPU (in fp32 twice, 8 bytes
# each) and 3.2 GB on CUDA (bf16 and fp32, 6 bytes each), whatever the vocabulary and the number of tokens.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**29}


def chunk_sizes(tokens: int, columns: int, device: str, *, fused: bool = False) -> list[int]:
    """Return the tokens of each chunk: nearly equal, with at most CHUNK_LOGITS logits of `columns` each.

    On CUDA a `fused` loss keeps no fp32 copy of them, and takes twice as many in less memory.
    All tensor ranks must cut the same chunks.
    """
    limit = CHUNK_LOGITS[device] * (2 if fused and device == "cuda" else 1)
    most = max(1, min(CHUNK_TOKENS[device], limit // columns))
    size = ceil(tokens / ceil(tokens / most))
    full, rest = divmod(tokens, size)
    return [size] * full + ([rest] if rest else [])
