"""The console entry point: it maps each kind of exit to its message and exit code.

Exit codes: 0 done, 1 a rank failed or a layout differs, 2 refused, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP,
138 SIGUSR1.
"""

import os
import signal
import sys


def main() -> None:
    """Run the command of sys.argv."""
    try:
        # Inside, so that a Ctrl-C during these imports ends like any other.
        from launcher.command_line import run_command

        sys.exit(run_command(sys.argv[1:]))
    except BrokenPipeError:
        # Whoever reads our output, as `head` does, has seen enough. Python would still flush, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        from launcher.command_line import failure_during

        print(f"launcher: interrupted; all ranks have ended{failure_during(interrupt)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
