"""Buckets of gradients: whole weights, from the last to the first."""

import pytest

from launcher.parallel.buckets import buckets


@pytest.mark.parametrize(
    ("sizes", "filled", "expected"),
    [
        ([], 10, []),
        ([3], 10, [[3]]),
        ([1, 2, 3, 4], 4, [[4], [2, 3], [1]]),
        ([50, 1, 1, 50], 10, [[50], [50], [1, 1]]),
        ([1, 50, 6, 50, 6, 50], 10, [[50], [50], [6, 6], [50], [1]]),
        ([5, 5, 5, 5], 10, [[5, 5], [5, 5]]),
        ([1, 1, 1], 100, [[1, 1, 1]]),
    ],
)
def test_a_large_weight_is_a_bucket_and_small_ones_share_one_from_the_end(
    sizes: list[int], filled: int, expected: list[list[int]]
) -> None:
    assert [[sizes[place] for place in bucket] for bucket in buckets(sizes, filled)] == expected
