"""The console entry point: it maps each kind of exit to its message and exit code.

Exit codes: 0 done, 1 a rank failed or a layout differs, 2 refused, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP,
138 SIGUSR1.
"""

import signal
import sys

from launcher.streams import OutputLost, discard_output, open_standard_streams


def main() -> None:
    """Run the command of sys.argv."""
    open_standard_streams()
    try:
        # Inside, so that a Ctrl-C during these imports ends like any other.
        from launcher.command_line import run_command

        code = run_command(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except OutputLost as lost:
        discard_output()  # Python flushes the rest at exit, and would complain
        if not lost.is_reader_gone:  # such as `head`, which has seen enough
            print(f"launcher: the output cannot be written: {lost.why}", file=sys.stderr)
        raise
    except KeyboardInterrupt as interrupt:
        from launcher.command_line import failure_during

        print(f"launcher: interrupted; all ranks have ended{failure_during(interrupt)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
