"""Measure a model as Notus was measured.

    python eval.py COMMAND ...        # --help lists the commands, COMMAND --help its options

Each module in notus/evals is one command: it adds its options to the command line, and the
function that carries them out.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from notus.errors import UserError
from notus.evals import answers, comparison, harness, preferences, scores
from notus.generate import samples

COMMANDS = (preferences, answers, samples, scores, harness, comparison)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Measure a model as Notus was measured.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
