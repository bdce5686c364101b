"""A campaign: runs and faults of a seed in rounds, verified and tested, and the report.

The runs and faults of a round depend only on the seed and the number of the round. So an interrupted campaign
continues where it stopped, with the records of its journal.
"""

import random
import shlex
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from launcher.config.schema import RunConfig, StatesDtype
from tests.fuzz.children import Ended, Plan, Work, results
from tests.fuzz.draws import Draw, draw, drawn_from
from tests.fuzz.explained import EXPLAINED
from tests.fuzz.journal import Journal, as_ranges, from_ranges
from tests.fuzz.judging import (
    CAUGHT,
    CLEAN_LIMIT,
    OF_THE_MACHINE,
    OUTCOMES,
    Known,
    Outcome,
    judged,
    verified,
)
from tests.fuzz.lines import Lines
from tests.fuzz.mutants import Mutant, mutant_of, mutants_of, prepare

PER_DRAW = 10  # faults for each drawn run: the run is traced once
# Runs drawn in the first round, so that a fault can be tried in several runs, and in each later round.
FIRST, LATER = 6, 2
OTHERS = 2  # earlier runs that execute the faulty line, in which a fault that passed is tried again


@dataclass
class Campaign:
    """All results so far."""

    journal: Journal
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    clean: Counter[str] = field(default_factory=Counter)  # runs by precision
    alarms: list[tuple[str, str]] = field(default_factory=list)  # precision, and run with its failure
    disturbed: list[str] = field(default_factory=list)  # clean runs without a verdict, beside other load

    @property
    def unexplained(self) -> list[Outcome]:
        survived = [outcome for outcome in self.outcomes if outcome.kind == "survived"]
        return [outcome for outcome in survived if _key(outcome.mutant) not in EXPLAINED]

    @property
    def failed(self) -> bool:
        return bool(self.alarms or self.unexplained)

    def report(self) -> str:
        counts = Counter(outcome.kind for outcome in self.outcomes)
        caught, minutes = sum(counts[kind] for kind in CAUGHT), self.journal.seconds / 60
        lines = [f"seed {self.seed}, {minutes:.0f} minutes, results in {self.journal.path}"]
        if self.outcomes:
            lines.append(f"{len(self.outcomes)} faults")
            lines += [f"  {kind:<12} {counts[kind]:>5}  {meaning}" for kind, meaning in OUTCOMES.items()]
        if effective := caught + counts["survived"]:
            share = (
                f"{caught} of {effective} faults that change a number are caught ({caught / effective:.1%})"
            )
            explained = counts["survived"] - len(self.unexplained)
            lines.append(f"{share}; {explained} of the others are explained in tests/fuzz/explained.py")
        for precision, number in sorted(self.clean.items()):
            alarms = sum(of == precision for of, _ in self.alarms)
            lines.append(f"clean runs in {precision}: {number}, false alarms: {alarms}")
        for kind in ("survived", "no effect", "not reached"):
            lines += [text for o in self.outcomes if o.kind == kind for text in self._shown(o)]
        lines += [f"no verdict: {run}" for run in self.disturbed]
        return "\n".join([*lines, *(f"false alarm: {alarm}" for _, alarm in self.alarms)])

    def _shown(self, outcome: Outcome) -> list[str]:
        reason = EXPLAINED.get(_key(outcome.mutant)) if outcome.kind == "survived" else None
        why = " ".join(filter(None, [f"({outcome.detail})" if outcome.detail else "", reason]))
        return [f"{outcome.kind}: {outcome.mutant} {why}".rstrip(), f"    {repeat(outcome)}"]


def _key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.file, mutant.name, mutant.change


def repeat(outcome: Outcome) -> str:
    """Return the command that judges the same fault in the same run again."""
    fault = f"{outcome.mutant.file}:{outcome.mutant.number}"
    return f"python -m tests.fuzz --fault {fault} --run {shlex.quote(str(outcome.draw))}"


def precision_of(run: RunConfig) -> str:
    has_states = run.precision.states is StatesDtype.bf16
    return f"{run.precision.dtype.name}{' states' if has_states else ''}"


def clean_runs(campaign: Campaign, seconds: float, jobs: int) -> Iterator[str]:
    """Verify drawn runs without a fault; yield a line for each."""
    deadline, known = time.monotonic() + seconds, {}
    for record in campaign.journal.of_kind("run"):
        known[record["number"]] = record
        _count_clean(campaign, record)

    def plans() -> Iterator[Plan]:
        for number in count():
            if time.monotonic() >= deadline:
                return
            if number not in known:
                yield _clean(draw(random.Random(f"{campaign.seed}/clean/{number}")), number, traced=False)

    for record in results(plans(), jobs):
        campaign.journal.add(record)
        yield _count_clean(campaign, record)


def mutation_runs(campaign: Campaign, seconds: float, jobs: int) -> Iterator[str]:
    """Draw runs and faults, and judge them; yield a line for each."""
    prepare()
    deadline, known, judged_before = time.monotonic() + seconds, list[Known](), _resumed(campaign)
    for number in count():
        rng = random.Random(f"{campaign.seed}/{number}")
        drawn = [draw(rng) for _ in range(LATER if number else FIRST)]
        fresh = yield from _known_runs(campaign, number, drawn, jobs, deadline)
        known += fresh
        faults = [(mutant, run) for run in fresh for mutant in _chosen(rng, run)]
        rng.shuffle(faults)
        faults = [(mutant, run) for mutant, run in faults if _place(mutant) not in judged_before]
        for outcome in results(_plans(faults, known, deadline), jobs):
            campaign.outcomes.append(outcome)
            campaign.journal.add(_as_record(outcome))
            judged_before.add(_place(outcome.mutant))
            yield f"{outcome.kind:<12} {outcome.seconds:5.1f} s  {outcome.mutant}  {outcome.detail}"
        if time.monotonic() >= deadline:
            return


def _plans(faults: list[tuple[Mutant, Known]], known: list[Known], deadline: float) -> Iterator[Plan]:
    for mutant, run in faults:
        if time.monotonic() < deadline:
            yield judged(mutant, run, known, OTHERS)


def _resumed(campaign: Campaign) -> set[tuple[str, int]]:
    """Take over runs and faults of the journal; return the places of the faults."""
    for record in campaign.journal.of_kind("run"):
        _count_clean(campaign, record)
    records = campaign.journal.of_kind("fault")
    drawn = {record["run"]: drawn_from(record["run"].split()) for record in records}
    for record in records:
        mutant = Mutant(*(record[name] for name in ("file", "number", "line", "name", "change")))
        end = record["outcome"], record["detail"], record["seconds"]
        campaign.outcomes.append(Outcome(mutant, drawn[record["run"]], *end))
    return {_place(outcome.mutant) for outcome in campaign.outcomes}


def _place(mutant: Mutant) -> tuple[str, int]:
    return mutant.file, mutant.number


def _as_record(outcome: Outcome) -> dict[str, Any]:
    m = outcome.mutant
    return {
        "kind": "fault", "outcome": outcome.kind, "file": m.file, "line": m.line, "name": m.name,
        "change": m.change, "number": m.number, "detail": outcome.detail,
        "seconds": round(outcome.seconds, 1), "run": str(outcome.draw), "repeat": repeat(outcome),
    }  # fmt: skip


def _known_runs(
    campaign: Campaign, number: int, drawn: list[Draw], jobs: int, deadline: float
) -> Generator[str, None, list[Known]]:
    """Verify the runs of a round without a fault, or take them from the journal; return those that pass."""
    names = [f"{number}/{place}" for place in range(len(drawn))]
    records = {record["number"]: record for record in campaign.journal.of_kind("run")}
    plans = (
        _clean(run, name, traced=True)
        for run, name in zip(drawn, names, strict=True)
        if name not in records and time.monotonic() < deadline
    )
    for record in results(plans, jobs):
        records[record["number"]] = record
        campaign.journal.add(record)
        yield _count_clean(campaign, record)
    return [
        Known(
            run,
            {file: from_ranges(ranges) for file, ranges in record["lines"].items()},
            record["numbers"],
            record["worst"],
            record["seconds"],
        )
        for run, name in zip(drawn, names, strict=True)
        if (record := records.get(name)) and record["ok"]
    ]


def _clean(drawn: Draw, number: int | str, *, traced: bool) -> Plan:
    """Verify a run without a fault; return the record of it."""
    lines = Lines()
    ended: Ended = yield Work(partial(verified, drawn, None, lines if traced else None), CLEAN_LIMIT)
    answer = ended.answer or {}
    executed = lines.executed() if traced else {}
    return {
        "kind": "run", "number": number, "ok": bool(answer.get("ok")), "run": str(drawn),
        "precision": precision_of(drawn.small), "seconds": round(ended.seconds, 1),
        "why": answer.get("why", "") or ended.error, "worst": answer.get("worst", 0.0),
        "disturbed": ended.timed_out or bool(not answer and OF_THE_MACHINE.search(ended.error)),
        "numbers": answer.get("numbers", []), "lines": {file: as_ranges(at) for file, at in executed.items()},
    }  # fmt: skip


def _count_clean(campaign: Campaign, record: dict[str, Any]) -> str:
    shown = f"{record['seconds']:5.1f} s  {record['run']}"
    if record["disturbed"]:
        campaign.disturbed.append(f"{record['run']}: {record['why']}")
        return f"disturbed    {shown}: {record['why']}"
    campaign.clean[record["precision"]] += 1
    if record["ok"]:
        return f"clean        {shown}"
    campaign.alarms.append((record["precision"], f"{record['run']}: {record['why']}"))
    return f"FALSE ALARM  {shown}: {record['why']}"


def _chosen(rng: random.Random, run: Known) -> list[Mutant]:
    every = [mutant for file, lines in run.lines.items() for mutant in mutants_of(file, lines)]
    return rng.sample(every, min(PER_DRAW, len(every)))


def judge_one(file: str, number: int, overrides: list[str]) -> Outcome | None:
    """Judge one fault in one run again; None if the run fails without the fault."""
    prepare()
    mutant, drawn = mutant_of(file, number), drawn_from(overrides)
    [record] = results([_clean(drawn, "repeated", traced=False)], 1)
    if not record["ok"]:
        return None
    run = Known(drawn, {}, record["numbers"], record["worst"], record["seconds"])
    [outcome] = results([judged(mutant, run, [], 0)], 1)
    assert isinstance(outcome, Outcome)
    return outcome
