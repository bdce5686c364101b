"""The benchmark against peers: a run of a tiny class, and the arithmetic of its results."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import growth
from benchmarks.contest import operators
from benchmarks.contest.classes import Class, Peer
from benchmarks.contest.command import main, report
from benchmarks.contest.job import ROOT
from benchmarks.contest.memory import _MARK, peak_of
from benchmarks.contest.ranks import Turn
from benchmarks.contest.results import ClassResult, Measured
from benchmarks.contest.table import table
from benchmarks.cpu import CPU
from benchmarks.gpu import GPU

TINY_RUN = "--model tiny --only single --peer plain --quick --measure time operators".split()


@pytest.mark.slow
def test_the_plain_loop_and_the_launcher_train_alike_in_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rounds of one step after three steps whose losses are compared."""
    code = main(CPU, [*TINY_RUN, "--results", str(tmp_path)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "| single | **launcher** |" in shown.out
    [tiny] = json.loads((tmp_path / "cpu.json").read_text())["classes"]
    ours, plain = tiny["contestants"]
    assert len(ours["seconds"]) == len(plain["seconds"]) == 2
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert len(set(ours["losses"])) == 3
    assert plain["against_ours"]["target"] == 1.0
    assert (tmp_path / "cpu.png").stat().st_size > 0
    assert "| tiny, single, ms per step of rank 0 | launcher | plain loop |" in shown.out
    for contestant in (ours, plain):
        step = 1e3 * min(contestant["seconds"])
        assert contestant["operators"]["aten::addmm"] > 0
        assert sum(contestant["operators"].values()) > 0.3 * step


@pytest.mark.slow
def test_the_growth_of_the_costs_is_measured_and_drawn(tmp_path: Path) -> None:
    """Two points of one series, two rounds, and twenty steps of one run."""
    assert growth.main(["--quick", "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "growth.json").read_text())
    small, large = found["series"]["layers"]
    assert (small["value"], large["value"]) == (2, 4)
    assert min(small["step_s"], large["step_s"]) > 0
    assert large["peak_bytes"] > small["peak_bytes"] > 0
    assert len(found["steps"]["step_s"]) == len(found["steps"]["resident_bytes"]) == 2
    assert (tmp_path / "growth.png").stat().st_size > 0


def result(ours: Measured, *peers: Measured, target: float = 1.0) -> ClassResult:
    shape = Class("dp", (), tuple(Peer(m.label, "ddp", target) for m in peers), memory_target=1.02)
    return ClassResult("tiny", shape, "fp32", 100, [ours, *peers])


OURS = Measured("launcher", seconds=[1.0, 2.0, 1.0], losses=[4.0, 3.0], peak_bytes=101)


def test_a_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    slower = Measured("DDP", seconds=[1.1, 2.0, 1.5], losses=[4.0, 3.0], peak_bytes=100)
    [comparison] = result(OURS, slower).comparisons()
    assert comparison.ratio == pytest.approx(1.1)
    assert comparison.spread == pytest.approx((1.05, 1.3))
    assert comparison.is_met
    assert "1.100 | 1.050 to 1.300 | ≥ 1.00 met" in table("tiny", [result(OURS, slower)])


def test_only_the_lowest_peak_of_the_peers_is_a_target() -> None:
    peers = [Measured("DDP", peak_bytes=98), Measured("DeepSpeed", peak_bytes=200)]
    lowest, other = result(OURS, *peers).comparisons()
    assert lowest.memory_is_met is False
    assert other.memory_is_met is None


def test_other_losses_and_failed_peers_end_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    other = Measured("DDP", seconds=[1.0, 1.0, 1.0], losses=[4.0, 3.001])
    failed = Measured("DeepSpeed", failed="DeepSpeed: rank 1 failed\nTraceback")
    assert report([result(OURS, other, failed)]) == 1
    shown = capsys.readouterr()
    assert "| | DDP | 100 | losses differ |" in shown.out
    assert "| | DeepSpeed | failed |" in shown.out
    assert "the first losses of DDP differ from ours by 3.3e-04" in shown.err
    assert "DeepSpeed: rank 1 failed" in shown.err
    assert report([result(OURS, Measured("DDP", seconds=[1.0], losses=[4.0, 3.0]))]) == 0


def test_operators_that_take_most_are_shown_and_the_others_added_up() -> None:
    ours = {f"aten::{index}": float(index) for index in range(operators.MOST_ROWS + 2)}
    theirs = {"aten::own": 1000.0, operators.OUTSIDE: 0.25}
    lines = operators.operator_table("tiny, dp", {"launcher": ours, "DDP": theirs}).splitlines()
    assert lines[0] == "| tiny, dp, ms per step of rank 0 | launcher | DDP |"
    assert lines[2] == "| aten::own | 0.00 | 1000.00 |"
    assert len(lines) == operators.MOST_ROWS + 4
    assert lines[-2] == "| other operators | 3.00 | 0.25 |"
    assert lines[-1] == f"| whole step | {sum(ours.values()):.2f} | 1000.25 |"


def test_steps_of_a_turn_share_its_time() -> None:
    assert Turn(started=1.0, ended=4.0, losses=[0.0, 0.0], peak_bytes=None).seconds == 1.5


def test_peak_memory_counts_what_is_live_at_the_mark() -> None:
    def event(name: str, at: int, size: int = 0) -> SimpleNamespace:
        return SimpleNamespace(name=lambda: name, start_ns=lambda: at, nbytes=lambda: size)

    changes = [(1, 70), (2, -40), (4, 10), (5, -10), (6, 25), (7, -55)]
    events = [*(event("[memory]", at, size) for at, size in changes), event(_MARK, 3), event("aten::mm", 4)]
    assert peak_of(events) == 55  # 30 live at the mark; the 70 before it are gone


def test_classes_hold_the_targets_of_every_peer() -> None:
    """The labels and modules exist, and a class names the peer that its memory is held against."""
    for benchmark in (CPU, GPU):
        names = [shape.name for shape in benchmark.classes]
        assert len(set(names)) == len(names)
        for shape in benchmark.classes:
            assert shape.memory_peer in (None, *(peer.label for peer in shape.peers))
            for peer in shape.peers:
                assert (ROOT / "benchmarks" / "peers" / f"{peer.module}.py").is_file()
