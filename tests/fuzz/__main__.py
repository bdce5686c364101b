"""Random runs and automatic faults: `python -m tests.fuzz --seed N --minutes M`.

Draws runs (layout, model, precision, ...), and automatic faults of launcher/parallel, models and engine on
lines that the run executes. Verifies each fault, and if verify passes, runs the quick tests of the file.
Prints the share of faults that are caught, and each fault that is not, with a command that repeats it.
`--clean` verifies runs without faults and counts false alarms.

Results are written as JSON lines as they come; the same command continues with them. The exit code is 1 after
a false alarm, and after a survivor that tests/fuzz/explained.py does not list.
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported: forked processes have no threads of torch

from tests.fuzz.campaign import Campaign, clean_runs, judge_one, mutation_runs
from tests.fuzz.journal import Journal, OtherCampaign


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same runs and faults")
    parser.add_argument("--minutes", type=float, default=5.0, help="no further fault starts after these")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--clean", action="store_true", help="runs without faults only")
    parser.add_argument("--results", type=Path, help="JSON lines (default: runs/fuzz-SEED.jsonl)")
    parser.add_argument("--fault", metavar="FILE:NUMBER", help="judge one fault again, in the run --run")
    parser.add_argument("--run", metavar="OVERRIDES", help="the run of --fault")
    options = parser.parse_args(arguments)
    if options.fault:
        return _judge(parser, options)
    name = f"fuzz-clean-{options.seed}" if options.clean else f"fuzz-{options.seed}"
    try:
        journal = Journal.open(
            options.results or Path("runs") / f"{name}.jsonl", options.seed, clean=options.clean
        )
    except OtherCampaign as error:
        parser.error(str(error))
    campaign = Campaign(journal, options.seed)
    run = clean_runs if options.clean else mutation_runs
    try:
        for line in run(campaign, options.minutes * 60, options.jobs):
            print(line, flush=True)
    except (KeyboardInterrupt, SystemExit):
        print("interrupted: the same command goes on")
        print(campaign.report(), flush=True)
        raise
    print(campaign.report())
    return int(campaign.failed)


def _judge(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    file, _, number = options.fault.rpartition(":")
    if not file or not number.isdecimal() or not options.run:
        parser.error("--fault needs FILE:NUMBER, such as parallel/layers.py:17, and --run=OVERRIDES")
    outcome = judge_one(file, int(number), shlex.split(options.run))
    if outcome is None:
        print("false alarm: the run fails without the fault")
        return 1
    print(f"{outcome.kind}: {outcome.mutant}\n    {outcome.detail}")
    return int(outcome.kind == "survived")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
