"""A campaign of faults against the launcher: `python -m tests.faults --seed N [--count N] [--family NAME]`.

Prints a line for each rule that a try broke, with the arguments that repeat the try, and a table of counts.
The exit code is 1 if a rule was broken.
"""

import argparse
import os
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported: ranks share the machine's cores

from tests.faults.campaign import KINDS, outcomes, report
from tests.faults.families import FAMILIES


def main(arguments: list[str]) -> int:
    kinds = "\n".join(f"  {kind:<10} {meaning}" for kind, meaning in KINDS.items())
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__,
        epilog=f"rules:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same tries")
    parser.add_argument("--count", type=int, help="tries of each family; by default those of a full campaign")
    parser.add_argument("--family", choices=FAMILIES, help="only this family")
    parser.add_argument("--only", metavar="FAMILY:INDEX", help="only this try")
    parser.add_argument("--verbose", action="store_true", help="print every try")
    parser.add_argument("--jobs", type=int, default=1, help="tries at a time")
    options = parser.parse_args(arguments)
    if options.only:
        name, _, index = options.only.partition(":")
        tries = [(FAMILIES[name], int(index))]
    else:
        families = [FAMILIES[options.family]] if options.family else FAMILIES.values()
        tries = [(family, index) for family in families for index in range(options.count or family.count)]
    results = []
    for outcome in outcomes(tries, options.seed, options.jobs):
        results.append(outcome)
        for line in outcome.lines(options.seed):
            print(line, flush=True)
        if options.verbose or options.only:
            print(f"{outcome.family}:{outcome.index}  {outcome.seconds:.1f} s  [{outcome.case}]", flush=True)
    print(report(results))
    return int(any(outcome.broken for outcome in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and remove the directories of the tries
    sys.exit(main(sys.argv[1:]))
