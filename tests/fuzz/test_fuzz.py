"""The fuzzer itself, and a short campaign."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from launcher.parallel import vocabulary
from tests.fuzz import __main__ as command
from tests.fuzz import campaign as campaigns
from tests.fuzz import judging, mutants
from tests.fuzz.campaign import Campaign
from tests.fuzz.children import Ended, Plan, Work, results
from tests.fuzz.draws import SETTINGS, Draw, check_small, draw
from tests.fuzz.journal import Journal, OtherCampaign, as_ranges, from_ranges
from tests.fuzz.judging import Known, Outcome, judged
from tests.fuzz.lines import Lines
from tests.fuzz.mutants import Mutant, apply, files, mutant_of, mutants_of, prepare
from tests.fuzz.nearby import COUNTS, quick_tests_of

ROOT = Path(__file__).parents[2]
EVERY_LINE = set(range(10_000))


@cache
def a_run() -> Draw:
    return draw(random.Random(0))


@pytest.mark.slow
def test_equal_seeds_draw_equal_runs_and_every_value_is_drawn() -> None:
    one, other = ([draw(random.Random(seed)) for seed in range(4)] for _ in range(2))
    assert one == other
    assert len({str(each) for each in one}) == 4
    drawn = [draw(rng) for rng in [random.Random(0)] for _ in range(40)]
    assert {each.small.parallelism.zero_stage for each in drawn} == {0, 1, 2, 3}
    for axis in ("data", "tensor", "pipeline", "context"):
        assert {getattr(each.small.parallelism, axis) for each in drawn} == {1, 2}
    assert {each.small.precision.dtype.name for each in drawn} == {"fp32", "bf16"}
    assert SETTINGS.keys() <= {word.partition("=")[0] for each in drawn for word in each.overrides}
    for each in drawn:
        check_small(each)


def faults_in(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    (tmp_path / "parallel").mkdir(exist_ok=True)
    (tmp_path / "parallel" / "a.py").write_text(source)
    monkeypatch.setattr(mutants, "PACKAGE", tmp_path)
    forget()
    try:
        return [mutant.change for mutant in mutants_of("parallel/a.py", EVERY_LINE)]
    finally:
        forget()


def forget() -> None:
    mutants._tree.cache_clear()
    mutants._all.cache_clear()


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


@pytest.mark.slow
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
    assert quick_tests_of("engine/machine_probe.py") == [COUNTS]
    assert COUNTS in quick_tests_of("engine/gradient_passes.py")


def test_reached_code_is_noticed() -> None:
    prepare()
    faults = [m for m in mutants_of("parallel/vocabulary.py", EVERY_LINE) if m.name == "padded_length"]
    assert mutant_of("parallel/vocabulary.py", faults[0].number) == faults[0]

    def marked(mutant: Mutant) -> list[object]:
        calls = []
        assert apply(mutant, lambda: not calls.append(1))  # type: ignore[func-returns-value]
        before = len(calls)
        return [before, vocabulary.padded_length(5, 2, 1), len(calls)]

    def plan(mutant: Mutant) -> Plan:
        ended = yield Work(lambda: marked(mutant), 60.0)
        return ended

    for mutant in faults:
        [ended] = results([plan(mutant)], 1)
        assert not ended.error
        before, number, calls = ended.answer
        assert (before, number) == (0, run(mutant)[1])
        assert calls > 0


def test_changed_code_can_be_compiled_with_and_without_marks() -> None:
    rng = random.Random(0)
    for file in rng.sample(files(), 8):
        for mutant in rng.sample(every := mutants_of(file, EVERY_LINE), min(6, len(every))):
            names = mutants._compiled(mutant, lambda node: node).keys()
            assert names == mutants._compiled(mutant, mutants._marked).keys(), mutant


MUTANT = Mutant("parallel/a.py", 0, 7, "f", "x -> y")
RIGHT = {"ok": True, "numbers": ["1"], "worst": 0.5, "reached": True}
CHANGED = {**RIGHT, "numbers": ["2"]}
WRONG = {"ok": False, "lost": False, "hangs": False, "why": "plain SGD, fp32: the output"}
LOST, HANGS = {**WRONG, "lost": True}, {**WRONG, "lost": True, "hangs": True}
KILLED, LATE = Ended(None, "ended with status -9", False, 1.0), Ended(None, "no end within 1 s", True, 1.0)
UNCHANGED = {"unchanged": True}


def judgement(*ends: object, tests: bool = False) -> tuple[str, int]:
    """Return how a fault ends whose works end like this, in order, and how many works there were."""
    known = Known(a_run(), {}, ["1"], 0.5, 1.0)
    plan, given = judged(MUTANT, known, [known], 2), 0
    next(plan)
    try:
        while True:
            end = ends[given]
            given += 1
            plan.send(end if isinstance(end, Ended) else Ended(end, "", False, 1.0))
    except StopIteration as stop:
        return stop.value.kind, given


@pytest.fixture
def no_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "quick_tests_of", lambda _: [])


@pytest.mark.usefixtures("no_tests")
@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        ([WRONG], "verify"),
        ([LOST], "crash"),
        ([UNCHANGED], "unchanged"),
        ([RIGHT], "no effect"),
        ([{**RIGHT, "reached": False}], "not reached"),
        ([CHANGED, RIGHT], "survived"),
        # A hang, and an error that load can cause, are tried again after the clean run.
        ([HANGS, RIGHT, HANGS], "hang"),
        ([LATE, RIGHT, LATE], "hang"),
        ([LATE, RIGHT, RIGHT], "no effect"),
        ([LATE, LATE], "disturbed"),
        ([KILLED, RIGHT, WRONG], "verify"),
        ([KILLED, KILLED], "disturbed"),
    ],
)
def test_a_loaded_machine_catches_no_fault(ends: list[object], kind: str) -> None:
    assert judgement(*ends) == (kind, len(ends))


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        ([None], "no effect"),
        (["a.py::b", None, "a.py::b"], "test"),
        (["a.py::b", "a.py::b", "a.py::b", None], "no effect"),  # fails without the fault too
        (["a.py::b", None, None, None], "no effect"),  # fails now and then
        ([LATE, LATE, LATE], "no effect"),  # the tests take too long without the fault too
        ([LATE, None, LATE], "test"),
    ],
)
def test_a_test_counts_if_it_passes_without_the_fault(
    ends: list[object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "quick_tests_of", lambda _: [Path("a.py")])
    assert judgement(RIGHT, *ends) == (kind, 1 + len(ends))


def test_a_fault_that_passes_is_tried_in_other_runs_that_execute_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judging, "quick_tests_of", lambda _: [])
    drawn = a_run()
    own, other, elsewhere = (Known(drawn, {MUTANT.file: lines}, ["1"], 0.5, 1.0) for lines in ({7}, {7}, {8}))
    plan = judged(MUTANT, own, [own, other, elsewhere], 2)
    next(plan)
    plan.send(Ended(RIGHT, "", False, 1.0))
    with pytest.raises(StopIteration) as stop:
        plan.send(Ended(WRONG, "", False, 1.0))
    assert stop.value.value.kind == "verify"


def test_the_report_counts_and_names_survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = a_run()
    campaign = Campaign(Journal.open(tmp_path / "a.jsonl", 3, clean=False), 3)
    for kind in ("verify", "crash", "test", "survived", "no effect", "not reached", "unchanged", "disturbed"):
        mutant = Mutant("parallel/a.py", 5, 7, "f", f"{kind} -> x")
        campaign.outcomes.append(Outcome(mutant, one, kind, "", 1.0))
    text = campaign.report()
    assert "3 of 4 faults that change a number are caught (75.0%); 0 of the others are explained" in text
    assert "survived: launcher/parallel/a.py:7 (f): survived -> x" in text
    assert "python -m tests.fuzz --fault parallel/a.py:5 --run 'model=" in text
    assert "not reached: launcher/parallel/a.py:7" in text
    assert campaign.failed
    explained = {("parallel/a.py", "f", "survived -> x"): "another order of a sum"}
    monkeypatch.setattr(campaigns, "EXPLAINED", explained)
    assert "another order of a sum" in campaign.report()
    assert not campaign.failed


def test_a_journal_goes_on_and_refuses_other_campaigns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Journal.open(path, 3, clean=False)
    first.add({"kind": "fault", "number": 1})
    with path.open("a") as file:
        file.write('{"kind": "fau')  # killed while it wrote
    again = Journal.open(path, 3, clean=False)
    assert [record["number"] for record in again.of_kind("fault")] == [1]
    assert again.session == 2
    assert len(Journal.open(path, 3, clean=False).of_kind("campaign")) == 3
    again.add({"kind": "fault", "number": 2})
    assert [r["number"] for r in Journal.open(path, 3, clean=False).of_kind("fault")] == [1, 2]
    with pytest.raises(OtherCampaign, match="seed is 3, not 4"):
        Journal.open(path, 4, clean=False)


def test_lines_are_written_as_ranges() -> None:
    numbers = {1, 2, 3, 7, 9, 10}
    assert as_ranges(numbers) == [[1, 3], [7, 7], [9, 10]]
    assert from_ranges(as_ranges(numbers)) == numbers


def planted(drawn: object, mutant: Mutant | None = None, lines: Lines | None = None) -> dict[str, object]:
    """Like judging.verified, of a launcher whose comparisons see nothing: each fault changes numbers."""
    if lines is not None:
        lines.begin()
        vocabulary.padded_length(5, 2, 1)
    return CHANGED if mutant else RIGHT


@pytest.mark.slow
@pytest.mark.usefixtures("no_tests")
def test_a_planted_survivor_fails_the_campaign_which_can_be_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "verified", planted)
    monkeypatch.setattr(campaigns, "verified", planted)
    monkeypatch.setattr(campaigns, "draw", lambda _: a_run())
    monkeypatch.setattr(campaigns, "count", lambda: range(1))  # rounds
    words = ["--seed", "1", "--results", str(tmp_path / "a.jsonl"), "--minutes"]
    assert command.main([*words, "10"]) == 1
    output = capsys.readouterr().out
    assert "survived: launcher/parallel/vocabulary.py:" in output
    judged_first = len(Journal.open(tmp_path / "a.jsonl", 1, clean=False).of_kind("fault"))
    assert judged_first > 0
    assert command.main([*words, "0"]) == 1  # the same faults, and no further one
    assert f"{judged_first} faults" in capsys.readouterr().out
    assert len(Journal.open(tmp_path / "a.jsonl", 1, clean=False).of_kind("fault")) == judged_first


@pytest.mark.slow
def test_a_short_campaign(tmp_path: Path) -> None:
    """No fault survives that is not explained, and no clean run fails."""
    words = [sys.executable, "-m", "tests.fuzz", "--seed", "18", "--minutes", "2"]
    done = subprocess.run(
        [*words, "--results", str(tmp_path / "results.jsonl")],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    outcomes = [record["outcome"] for record in records if record["kind"] == "fault"]
    assert sum(outcome in judging.CAUGHT for outcome in outcomes) > 0, done.stdout
    assert outcomes.count("disturbed") <= len(outcomes) // 4, done.stdout
