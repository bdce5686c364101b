"""The fuzzer itself, and a short campaign."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.parallel import vocabulary
from tests.fuzz import mutants
from tests.fuzz.campaign import Campaign, Outcome
from tests.fuzz.children import Plan, Work, results
from tests.fuzz.draws import SETTINGS, draw
from tests.fuzz.lines import Lines
from tests.fuzz.mutants import Mutant, apply, files, mutants_of, prepare
from tests.fuzz.nearby import quick_tests_of

ROOT = Path(__file__).parents[2]
EVERY_LINE = set(range(10_000))


def test_equal_seeds_draw_equal_runs_and_every_value_is_drawn() -> None:
    one, other = ([draw(random.Random(seed)) for seed in range(4)] for _ in range(2))
    assert one == other
    assert len({str(each) for each in one}) == 4
    drawn = [draw(rng) for rng in [random.Random(0)] for _ in range(40)]
    assert {each.small.parallelism.zero_stage for each in drawn} == {0, 1, 2, 3}
    for axis in ("data", "tensor", "pipeline"):
        assert {getattr(each.small.parallelism, axis) for each in drawn} == {1, 2}
    assert {each.small.precision.dtype.name for each in drawn} == {"fp32", "bf16"}
    assert SETTINGS.keys() <= {word.partition("=")[0] for each in drawn for word in each.overrides}


def faults_in(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    (tmp_path / "parallel").mkdir(exist_ok=True)
    (tmp_path / "parallel" / "a.py").write_text(source)
    monkeypatch.setattr(mutants, "PACKAGE", tmp_path)
    mutants._tree.cache_clear()
    try:
        return [mutant.change for mutant in mutants_of("parallel/a.py", EVERY_LINE)]
    finally:
        mutants._tree.cache_clear()


def test_operators_constants_arguments_and_statements_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = (
        "def f(x, y=1):\n    x.z = g(x, 2.5)\n    x += y\n    return max(x, key=x) if not x.t() else x < y\n"
    )
    assert faults_in(source, monkeypatch, tmp_path) == [
        "x.z = g(x, 2.5) -> pass", "g(x, 2.5) -> g(2.5, x, ...)", "2.5 -> 5.0",
        "x += y -> x -= y", "x += y -> pass",
        "not x.t() -> not (not x.t())", "not x.t() -> x.t()", "x.t() -> x",
        "max(x, key=x) -> without key=x", "x < y -> x <= y",
    ]  # fmt: skip


def test_messages_types_and_checks_do_not_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = '''A = 1 + 1
def f(x: int = 1 + 1) -> "a + b":
    """1 + 1"""
    assert x > 1
    print(x + 1)
    y: int
    zip(x, strict=True)
    raise ValueError(f"{x + 1}")
'''
    assert faults_in(source, monkeypatch, tmp_path) == ["zip(x, strict=True) -> pass"]


def in_a_process(mutant: Mutant) -> list[object]:
    """Apply a fault in a process of its own; return whether it changed code, and a number then."""
    return [apply(mutant), vocabulary.padded_length(5, 2, 1)]


def run(mutant: Mutant) -> list[object]:
    def plan() -> Plan:
        return (yield Work(lambda: in_a_process(mutant), 60.0))

    [ended] = results([plan()], 1)
    assert not ended.error
    return list(ended.answer)


def test_a_fault_is_applied_in_memory_in_one_process() -> None:
    prepare()
    right = vocabulary.padded_length(5, 2, 1)
    faults = [
        mutant
        for mutant in mutants_of("parallel/vocabulary.py", EVERY_LINE)
        if mutant.name == "padded_length"
    ]
    ended = [run(mutant) for mutant in faults]
    assert all(is_changed for is_changed, _ in ended)
    assert any(number != right for _, number in ended)
    assert vocabulary.padded_length(5, 2, 1) == right


def test_every_function_of_the_files_is_loaded() -> None:
    """Else their faults would count as no faults."""
    prepare()
    known = {
        (Path(path).relative_to(mutants.PACKAGE).as_posix(), name) for path, name in mutants._functions()
    }
    loaded = {file for file, _ in known}
    outer = {
        (m.file, m.name.partition(mutants.LOCALS)[0]) for file in loaded for m in mutants_of(file, EVERY_LINE)
    }
    assert len(loaded) > 20
    assert len(outer - known) <= len(outer) // 50, sorted(outer - known)


def test_executed_lines_are_those_of_this_process_and_of_its_children() -> None:
    lines = Lines()

    def traced() -> None:
        lines.begin()
        if not os.fork():
            vocabulary.padded_length(5, 2, 1)
            os._exit(0)
        os.wait()

    def plan() -> Plan:
        return (yield Work(traced, 60.0))

    [ended] = results([plan()], 1)
    assert not ended.error
    executed = lines.executed()
    assert executed["parallel/vocabulary.py"]
    assert not executed["parallel/mesh.py"]
    assert set(executed) == set(files())


def test_every_end_of_a_child_process_is_reported() -> None:
    def plan(work: Work) -> Plan:
        return (yield work)

    def crash() -> None:
        raise ValueError("broken")

    works = [
        Work(lambda: 1, 60.0), Work(crash, 60.0), Work(lambda: os.kill(os.getpid(), signal.SIGKILL), 60.0),
        Work(lambda: time.sleep(60), 0.5),
    ]  # fmt: skip
    ended = {id(work): end for work in works for end in results([plan(work)], 2)}
    fine, crashed, killed, late = (ended[id(work)] for work in works)
    assert (fine.answer, fine.error) == (1, "")
    assert "ValueError: broken" in crashed.error
    assert "status -9" in killed.error
    assert late.timed_out


def test_the_tests_of_a_file_begin_with_its_namesake() -> None:
    paths = [path.name for path in quick_tests_of("parallel/layers.py")]
    assert paths[0] == "test_layers.py"
    assert quick_tests_of("engine/machine_probe.py") == []


def test_the_report_counts() -> None:
    one = draw(random.Random(0))
    campaign = Campaign(3)
    for kind in ("verify", "crash", "test", "survived", "no effect", "unchanged"):
        mutant = Mutant("parallel/a.py", 0, 7, "f", f"{kind} -> x")
        campaign.outcomes.append(Outcome(mutant, one, kind, "", 1.0))
    text = campaign.report(60.0)
    assert "seed 3, 1 minutes, 5 faults" in text
    assert "3 of 4 faults that change a number are caught (75.0%); 1 more change none" in text
    assert "survived: launcher/parallel/a.py:7 (f): survived -> x" in text


@pytest.mark.slow
def test_a_short_campaign() -> None:
    words = [sys.executable, "-m", "tests.fuzz", "--seed", "18", "--minutes", "4"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        line.split()[0]: int(line.split()[1])
        for line in done.stdout.splitlines()
        if line.startswith("  ") and line.split()[1].isdecimal()
    }
    caught = sum(counts[kind] for kind in ("verify", "crash", "hang", "test"))
    assert caught > 0, done.stdout
    assert counts["survived"] <= 1 + caught // 8, done.stdout + json.dumps(counts)
