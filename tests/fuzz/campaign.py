"""A campaign: runs and faults of a seed, verified and tested, and the report."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launcher.parity.verification import verify
from tests.fuzz.children import Ended, Plan, Work, results
from tests.fuzz.draws import Draw, draw
from tests.fuzz.lines import Lines
from tests.fuzz.mutants import Mutant, apply, mutants_of, prepare
from tests.fuzz.nearby import failed_test, quick_tests_of

PER_DRAW = 10  # faults for each drawn run: the run is traced once
FIRST = 6  # runs drawn before the first fault, so that a fault can be tried in several runs
OTHERS = 2  # earlier runs that execute the faulty line, in which a fault that passed is tried again
CLEAN_LIMIT, TEST_LIMIT = 300.0, 240.0
# The outcomes of a fault. The last three do not count as caught.
OUTCOMES = {
    "verify": "a comparison of `launcher verify` fails",
    "crash": "a rank raises an error",
    "hang": "the ranks do not end; killed here after a multiple of the run's time",
    "test": "verify passes, and a quick test of the file fails",
    "unchanged": "the compiler makes the same instructions: no fault",
    "no effect": "every measured difference is the same to the last bit, and the tests pass",
    "survived": "numbers change within the bounds, and the tests pass",
}
CAUGHT = ("verify", "crash", "hang", "test")


@dataclass(frozen=True)
class Known:
    """A drawn run whose clean verification is known: executed lines, numbers and seconds."""

    draw: Draw
    lines: dict[str, set[int]]
    numbers: list[str]  # a digest of each pass
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The end of one fault."""

    mutant: Mutant
    draw: Draw
    kind: str
    detail: str
    seconds: float


@dataclass
class Campaign:
    """All results so far."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    clean: int = 0
    alarms: list[str] = field(default_factory=list)

    def report(self, seconds: float) -> str:
        counts = Counter(outcome.kind for outcome in self.outcomes)
        faults = len(self.outcomes) - counts["unchanged"]
        caught = sum(counts[kind] for kind in CAUGHT)
        effective = faults - counts["no effect"]
        rows = [f"  {kind:<10} {counts[kind]:>5}  {meaning}" for kind, meaning in OUTCOMES.items()]
        shares = f"{caught} of {effective} faults that change a number are caught"
        if effective:
            shares += f" ({caught / effective:.1%}); {counts['no effect']} more change none"
        lines = [f"seed {self.seed}, {seconds / 60:.0f} minutes, {faults} faults", *rows, shares]
        lines.append(f"{self.clean} clean runs, {len(self.alarms)} false alarms")
        for kind in ("survived", "no effect"):
            lines += [f"{kind}: {o.mutant}\n    {o.draw}" for o in self.outcomes if o.kind == kind]
        return "\n".join([*lines, *(f"false alarm: {alarm}" for alarm in self.alarms)])


def clean_runs(campaign: Campaign, seconds: float, jobs: int) -> Iterator[str]:
    """Verify drawn runs without a fault; yield a line for each."""
    rng, deadline = random.Random(campaign.seed), time.monotonic() + seconds

    def plans() -> Iterator[Plan]:
        while time.monotonic() < deadline:
            yield _clean(draw(rng), traced=False)

    for drawn, ended, _ in results(plans(), jobs):
        yield _count_clean(campaign, drawn, ended)


def mutation_runs(campaign: Campaign, seconds: float, jobs: int) -> Iterator[str]:
    """Draw runs and faults, and judge them; yield a line for each."""
    prepare()
    rng, deadline, known = random.Random(campaign.seed), time.monotonic() + seconds, list[Known]()
    while time.monotonic() < deadline:
        drawn = [draw(rng) for _ in range(jobs if known else FIRST)]
        fresh = []
        for one, ended, lines in results((_clean(one, traced=True) for one in drawn), jobs):
            yield _count_clean(campaign, one, ended)
            if ended.answer and ended.answer["ok"]:
                fresh.append(Known(one, lines, ended.answer["numbers"], ended.seconds))
        fresh.sort(key=lambda one: drawn.index(one.draw))
        known += fresh
        faults = [(mutant, one) for one in fresh for mutant in _chosen(rng, one)]
        rng.shuffle(faults)
        for outcome in results(_plans(faults, known, deadline), jobs):
            campaign.outcomes.append(outcome)
            yield f"{outcome.kind:<10} {outcome.seconds:5.1f} s  {outcome.mutant}  {outcome.detail}"


def _plans(faults: list[tuple[Mutant, Known]], known: list[Known], deadline: float) -> Iterator[Plan]:
    for mutant, one in faults:
        if time.monotonic() < deadline:
            yield _judged(mutant, one, [other for other in known if other is not one])


def _count_clean(campaign: Campaign, drawn: Draw, ended: Ended) -> str:
    campaign.clean += 1
    if ended.answer and ended.answer["ok"]:
        return f"clean      {ended.seconds:5.1f} s  {drawn}"
    campaign.alarms.append(f"{drawn}: {ended.answer or ended.error}")
    return f"FALSE      {ended.seconds:5.1f} s  {campaign.alarms[-1]}"


def _clean(drawn: Draw, *, traced: bool) -> Plan:
    lines = Lines()
    ended = yield Work(partial(_verified, drawn, None, lines if traced else None), CLEAN_LIMIT)
    return drawn, ended, lines.executed() if traced else {}


def _chosen(rng: random.Random, one: Known) -> list[Mutant]:
    every = [mutant for file, lines in one.lines.items() for mutant in mutants_of(file, lines)]
    return rng.sample(every, min(PER_DRAW, len(every)))


def _judged(mutant: Mutant, one: Known, known: list[Known]) -> Plan:
    """Verify the fault in its run, in other runs that execute its line, and then run the tests."""
    others = [other for other in reversed(known) if mutant.line in other.lines.get(mutant.file, ())][:OTHERS]
    has_effect, seconds = False, 0.0
    for run in (one, *others):
        ended = yield Work(partial(_verified, run.draw, mutant, None), 6 * run.seconds + 15)
        seconds += ended.seconds
        kind, detail = _kind(ended, run)
        if kind not in ("no effect", "survived"):
            return Outcome(mutant, run.draw, kind, detail, seconds)
        has_effect |= kind == "survived"
    paths = quick_tests_of(mutant.file)
    if paths:
        ended = yield Work(partial(_tested, mutant, paths), TEST_LIMIT)
        seconds += ended.seconds
        if ended.answer or ended.error:
            return Outcome(
                mutant, one.draw, "test", str(ended.answer or ended.error.splitlines()[-1]), seconds
            )
    return Outcome(mutant, one.draw, "survived" if has_effect else "no effect", "", seconds)


def _kind(ended: Ended, run: Known) -> tuple[str, str]:
    if ended.timed_out:
        return "hang", ended.error
    if ended.answer is None:
        return "crash", ended.error.strip().splitlines()[-1]
    if ended.answer.get("unchanged"):
        return "unchanged", ""
    if not ended.answer["ok"]:
        return ("crash" if ended.answer["lost"] else "verify"), ended.answer["why"]
    return ("no effect" if ended.answer["numbers"] == run.numbers else "survived"), ""


def _verified(drawn: Draw, mutant: Mutant | None, lines: Lines | None) -> dict[str, Any]:
    """Verify in this process, up to the first pass that fails."""
    if mutant is not None and not apply(mutant):
        return {"unchanged": True}
    if lines is not None:
        lines.begin()
    numbers = []
    for result in verify(drawn.small):
        if not result.ok:
            found = result.diagnosis
            lost = getattr(result, "lost_a_rank", False)
            shape = found.shape.strip().splitlines()[-1 if lost else 0] if found else ""
            return {"ok": False, "lost": lost, "why": f"{result.title}: {shape}"[:200]}
        measured = [(d.step, d.kind, d.name, d.measured.hex()) for d in result.differences]
        numbers.append(hashlib.sha256(repr(measured).encode()).hexdigest())
    return {"ok": True, "numbers": numbers}


def _tested(mutant: Mutant, paths: list[Path]) -> str | None:
    apply(mutant)
    return failed_test(paths)
