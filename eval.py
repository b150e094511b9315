"""Measure a model as Notus was measured.

    python eval.py COMMAND ...        # --help lists the commands, COMMAND --help its options

Each module in notus/evals that is listed in COMMANDS is one command: `add_command` adds its options
to the command line, and with them the function `run` that carries it out.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from notus.console import quiet_libraries, report_error
from notus.engine import distributed
from notus.errors import UserError
from notus.evals import answers, comparison, harness, preferences, scores, side_by_side

COMMANDS = (preferences, answers, side_by_side, scores, harness, comparison)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Measure a model as Notus was measured.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_command(commands)
    quiet_libraries()
    try:
        options = parser.parse_args(arguments)
        options.run(options)
    except UserError as error:
        report_error(error, prints=os.environ.get("RANK", "0") == "0")  # one process speaks
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
