"""Try each deliberate fault in a run in bf16: `python -m tests.parity.in_bf16 [WORDS OF A FAULT]`.

Only the pass in the run's own precision runs that the third column of the table in docs/verify.md names: the
fp32 passes of the same run would catch the fault as well. Prints a line per fault, and exits with 1 if a
fault is not caught.
"""

import sys

from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parallel import vocabulary
from launcher.parity.shrink import inner_stages, long_samples
from launcher.parity.verification import more_passes, whole_pass
from launcher.parity.whole import whole_run
from tests.config.composing import run_of
from tests.parity.mutations import BY_PASS, Mutation
from tests.parity.running import VerifyPass, dropout_pass, passes, run_pass, shrink, small_run

RANKS = 32  # of the runs before they are shrunk, at most


def result_in_bf16(title: str, mutation: Mutation) -> VerifyPass:
    """Return the result of the pass in bf16, with the fault, of a fault that the pass `title` shows first."""
    overrides = mutation.layout.split()
    if title == "bf16 states":
        return run_pass(*passes(small_run(*overrides, steps=1))[2], mutation.inject)
    overrides.append("precision=bf16")
    if title == "dropout":
        return dropout_pass(small_run(*overrides), mutation.inject)
    if title in ("plain SGD", "own optimizer"):
        return run_pass(*passes(small_run(*overrides, steps=1))[-1], mutation.inject)
    run = run_of("hardware=cpu", "verify.steps=1", *overrides)
    layout = validate(run, World("cpu", RANKS, RANKS))
    small, _ = shrink(run, layout)
    if title == "whole run":
        return whole_pass(whole_run(run, small), mutation.inject)
    assert title in ("inner stages", "long samples"), title
    is_long = title == "long samples"
    inner = None if is_long else inner_stages(run, layout, small)
    long = long_samples(run, layout, small) if is_long else None
    return run_pass(*more_passes(inner, long)[-1], mutation.inject)


def main(words: str) -> int:
    vocabulary.CHUNK_TOKENS["cpu"] = 5  # as in conftest.py
    missed = 0
    for title, of_pass in BY_PASS.items():
        for name, mutation in of_pass.items():
            if words not in name:
                continue
            result = result_in_bf16(title, mutation)
            diagnosis = result.diagnosis
            text = f"{diagnosis.shape}: {diagnosis.meaning}" if diagnosis else ""
            lacking = [part for part in mutation.in_bf16 or mutation.words if part not in text]
            missed += result.ok
            verdict = "MISSED" if result.ok else "other diagnosis" if lacking else "caught"
            print(f"{verdict:<16}{name} | {result.title} | {text}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
