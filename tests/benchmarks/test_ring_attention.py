"""The ring of simulated ranks computes whole attention; the same on a GPU: tests/engine/test_gpu.py."""

import pytest
import torch

from benchmarks.ring_attention import draw, errors, exact, fused, joined, main, parts_of, ring


@pytest.mark.parametrize("ranks", [2, 4])
def test_simulated_ranks_compute_whole_attention(ranks: int) -> None:
    inputs = draw(64, torch.float32, "cpu", 4, 2, 8)
    parts, right = parts_of(inputs, ranks), exact(inputs)
    assert max(errors(joined(parts, ring(parts)), right).values()) < 1e-6
    assert max(errors(fused(inputs), right).values()) < 1e-6
    parts[0], parts[1] = parts[1], parts[0]
    assert min(errors(joined(parts, ring(parts)), right).values()) > 0.1


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--device cpu --dtype fp32 --length 64 --rounds 1".split()) == 0
    first, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("64 tokens, 32 query and 8 key/value heads of 128, fp32, CPU")
    assert [row.split()[1] for row in rows] == ["2", "4", "8"]
