"""Settings of the C library's memory allocator, for tensors on a CPU."""

import ctypes

# Names and numbers of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 2**30  # bytes; larger blocks are still given back at once
_KEPT_AT_END = 2**31 - 1  # bytes of free memory at the end of the heap; the largest that mallopt takes


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, for the tensors of the next step.

    By default glibc gives large blocks back to the kernel, which clears each page when it is used again:
    up to 18,000 pages in a step of a GPT of 11 M parameters (docs/benchmarks.md). Does nothing without glibc.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_END)
