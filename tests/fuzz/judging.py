"""The judgement of one fault: verify in its run and in others that execute its line, then the quick tests.

A loaded machine can kill a rank, or make a right run slow. So a hang, and an error that a machine can cause,
count only if the clean run passes right afterwards and the fault shows again; and a test that fails counts
only if the test passes without the fault, and fails with it once more.
"""

import hashlib
import mmap
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.parity.verification import VerifyPass, verify
from tests.fuzz.children import Ended, Work
from tests.fuzz.draws import Draw, check_small
from tests.fuzz.lines import Lines
from tests.fuzz.mutants import Mutant, apply
from tests.fuzz.nearby import failed_test, quick_tests_of

CLEAN_LIMIT, TEST_LIMIT = 600.0, 240.0  # compiling blocks takes minutes
LEFT_OUT = 3  # tests that fail without the fault too, until the tests of a file count as passed
HANGS = "a rank does not take part in a collective"  # the diagnosis of verify's watchdog
OF_THE_MACHINE = re.compile(
    r"Resource temporarily unavailable|Cannot allocate memory|can't start new thread|No space left on device"
    r"|MemoryError|Too many open files|SIGKILL|status -9|Address already in use|Broken pipe"
)
# How a fault ends.
OUTCOMES = {
    "verify": "a comparison of `launcher verify` fails",
    "crash": "a rank raises an error",
    "hang": "the ranks do not end, twice, while the clean run does",
    "test": "verify passes, and a quick test of the file fails",
    "survived": "numbers change within the bounds, and the tests pass",
    "no effect": "every measured difference is the same to the last bit, and the tests pass",
    "not reached": "no run evaluates the changed code, and the tests pass",
    "unchanged": "the compiler makes the same instructions: no fault",
    "disturbed": "no verdict: the clean run failed as well, beside other load",
}
CAUGHT = ("verify", "crash", "hang", "test")
_PASSED = ("survived", "no effect", "not reached")


@dataclass(frozen=True)
class Known:
    """A drawn run whose clean verification is known: executed lines, numbers and seconds."""

    draw: Draw
    lines: dict[str, set[int]]
    numbers: list[str]  # a digest of each pass
    worst: float  # the largest measured difference, over its bound
    seconds: float

    @property
    def limit(self) -> float:
        """Seconds after which the run hangs."""
        return 6 * self.seconds + 15


@dataclass(frozen=True)
class Outcome:
    """The end of one fault."""

    mutant: Mutant
    draw: Draw
    kind: str
    detail: str
    seconds: float


Verdict = Generator[Work, Ended, tuple[str, str]]  # the kind of an outcome, and a detail


def judged(mutant: Mutant, own: Known, known: list[Known], others: int) -> Generator[Work, Ended, Outcome]:
    """Verify the fault in its run, then in other runs that execute its line, and then run the tests."""
    also = [run for run in reversed(known) if run is not own and _executes(run, mutant)][:others]
    spent, kinds, detail = [0.0], list[str](), ""
    for run in (own, *also):
        kind, why = yield from _timed(_verdict(mutant, run), spent)
        if kind not in _PASSED:
            return Outcome(mutant, run.draw, kind, why, spent[0])
        kinds.append(kind)
        detail = detail or why
    name = yield from _timed(_failing_test(mutant), spent)
    if name is not None:
        return Outcome(mutant, own.draw, "test", name, spent[0])
    kind = next(kind for kind in _PASSED if kind in kinds)
    return Outcome(mutant, own.draw, kind, detail, spent[0])


def _executes(run: Known, mutant: Mutant) -> bool:
    return mutant.line in run.lines.get(mutant.file, ())


def _timed(plan: Generator[Work, Ended, Any], spent: list[float]) -> Generator[Work, Ended, Any]:
    """Run a plan, and add the seconds of its work to `spent`."""
    ended: Ended | None = None
    while True:
        try:
            work = next(plan) if ended is None else plan.send(ended)
        except StopIteration as stop:
            return stop.value
        ended = yield work
        spent[0] += ended.seconds


def _verdict(mutant: Mutant, run: Known) -> Verdict:
    ended = yield Work(partial(verified, run.draw, mutant), run.limit)
    kind, detail = kind_of(ended, run)
    if kind == "hang" or (kind == "crash" and OF_THE_MACHINE.search(f"{detail}\n{ended.error}")):
        return (yield from _once_more(mutant, run))
    if kind == "survived":
        clean = yield Work(partial(verified, run.draw), CLEAN_LIMIT)
        if not clean.answer or clean.answer.get("numbers") != run.numbers:
            detail += "; the clean run does not repeat its own numbers"
    return kind, detail


def _once_more(mutant: Mutant, run: Known) -> Verdict:
    """Return the verdict of a second try, if the clean run passes before it."""
    clean = yield Work(partial(verified, run.draw), run.limit)
    if not (clean.answer and clean.answer["ok"]):
        return "disturbed", f"the clean run: {clean.error.strip()[-200:] or clean.answer}"
    again = yield Work(partial(verified, run.draw, mutant), 2 * run.limit)
    return kind_of(again, run)


def kind_of(ended: Ended, run: Known) -> tuple[str, str]:
    """Return how a verification with a fault ended, and a detail."""
    answer = ended.answer
    if ended.timed_out:
        return "hang", ended.error
    if answer is None:
        return "crash", ended.error.strip().splitlines()[-1]
    if answer.get("unchanged"):
        return "unchanged", ""
    if not answer["ok"]:
        return ("hang" if answer["hangs"] else "crash" if answer["lost"] else "verify"), answer["why"]
    if answer["numbers"] != run.numbers:
        worst = f"worst measured / allowed {answer['worst']:.3g}, without the fault {run.worst:.3g}"
        return "survived", worst
    return ("no effect" if answer["reached"] else "not reached"), ""


def _failing_test(mutant: Mutant) -> Generator[Work, Ended, str | None]:
    """Return a quick test that fails with the fault and passes without it; None if there is none."""
    paths, left_out = [str(path) for path in quick_tests_of(mutant.file)], list[str]()
    while paths and len(left_out) <= LEFT_OUT:
        ended = yield Work(partial(tested, mutant, paths, tuple(left_out)), TEST_LIMIT)
        if not (ended.answer or ended.error):
            return None
        # Without a name the process ended, or did not end, in one of the tests.
        failing = [ended.answer] if ended.answer else paths
        clean = yield Work(partial(tested, None, failing, tuple(left_out)), TEST_LIMIT)
        again = yield Work(partial(tested, mutant, failing, tuple(left_out)), TEST_LIMIT)
        if not (clean.answer or clean.error) and (again.answer or again.error):
            return str(ended.answer or ended.error.strip().splitlines()[-1])
        if not ended.answer:
            return None
        left_out.append(ended.answer)
    return None


def verified(drawn: Draw, mutant: Mutant | None = None, lines: Lines | None = None) -> dict[str, Any]:
    """Verify in this process, up to the first pass that fails."""
    seen = mmap.mmap(-1, 1)  # shared with the ranks

    def reached() -> bool:
        seen[0] = 1
        return True

    check_small(drawn)
    # A call inside a compiled graph would break it.
    if mutant is not None and not apply(mutant, None if drawn.small.training.compile else reached):
        return {"unchanged": True}
    if lines is not None:
        lines.begin()
    numbers, worst = [], 0.0
    for result in verify(drawn.small, run=drawn.run):
        if not result.ok:
            hangs = result.diagnosis is not None and result.diagnosis.meaning.startswith(HANGS)
            return {"ok": False, "lost": result.lost_a_rank, "hangs": hangs, "why": _why(result)}
        measured = [(d.step, d.kind, d.name, d.measured.hex()) for d in result.differences]
        numbers.append(hashlib.sha256(repr(measured).encode()).hexdigest()[:16])
        worst = max([worst, *(d.excess for d in result.differences)])
    is_reached = bool(seen[0]) or drawn.small.training.compile
    return {"ok": True, "numbers": numbers, "worst": worst, "reached": is_reached}


def _why(result: VerifyPass) -> str:
    """Return the pass, the last line of a lost rank or the diagnosis, and the first difference."""
    lines = result.diagnosis.shape.strip().splitlines() if result.diagnosis else [""]
    text = f"{result.title}: {lines[-1 if result.lost_a_rank else 0]}"[:200]
    first = next(difference for difference in result.differences if not difference.ok)
    return (
        f"{text} (step {first.step}, {first.kind} {first.name}: {first.measured:.2e} / {first.allowed:.2e})"
    )


def tested(mutant: Mutant | None, tests: list[str], left_out: tuple[str, ...]) -> str | None:
    """Run quick tests in this process, with the fault if there is one; return the first that fails."""
    if mutant is not None:
        apply(mutant)
    return failed_test(tests, left_out)
