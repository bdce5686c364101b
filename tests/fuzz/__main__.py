"""Random runs and automatic faults: `python -m tests.fuzz --seed N --minutes M`.

Draws runs (layout, model, precision, ...), and automatic faults of launcher/parallel, models and engine on
lines that the run executes. Verifies each fault, and if verify passes, runs the quick tests of the file.
Prints the share of faults that are caught, and each fault that is not. `--clean` verifies runs without faults
and counts false alarms. The exit code is 1 after a false alarm.
"""

import argparse
import os
import signal
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported: forked processes have no threads of torch

from tests.fuzz.campaign import Campaign, clean_runs, mutation_runs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="no further fault starts after these")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--clean", action="store_true", help="runs without faults only")
    options = parser.parse_args(arguments)
    campaign, started = Campaign(options.seed), time.monotonic()
    run = clean_runs if options.clean else mutation_runs
    for line in run(campaign, options.minutes * 60, options.jobs):
        print(line, flush=True)
    print(campaign.report(time.monotonic() - started))
    return int(bool(campaign.alarms))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
