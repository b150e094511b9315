"""The exception for a user's mistakes, and its way to every rank."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class UserError(ValueError):
    """The configuration, the data or a model folder cannot be used.

    The message names the file, row or key, what was found and what was expected. The commands
    print only the message, without a traceback, and exit with code 2. Any other exception is a
    defect of this project and keeps its traceback. As text each argument is one line, those after
    the first indented: of what it quotes, line breaks are spaces, and characters that do not print
    are escaped.
    """

    def __str__(self) -> str:
        lines = []
        for argument in map(str, self.args):
            line = " ".join(filter(None, map(str.strip, argument.splitlines())))
            lines.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
        return "\n  ".join(lines)


@contextmanager
def agreed(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise a UserError that the block raises on any rank on every rank, at the block's end.

    Without this, the other ranks would wait for the failed one in their next collective. The block
    itself must not contain a collective: a rank that failed before it would not take part.
    Collective, over `group` (default: all ranks; without a process group, this process).
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = error.args
    problems = [problem]
    if dist.is_initialized():
        problems *= dist.get_world_size()
        dist.all_gather_object(problems, problem, group)
    for found in problems:
        if found is not None:
            raise UserError(*found)


@contextmanager
def naming_options(*keys: str) -> Iterator[None]:
    """Add a line to a UserError that advises `keys` of a source: a command's options of that name.

    They have the key's value: `"ignore": ["tools"]` is --ignore tools.
    """
    try:
        yield
    except UserError as error:
        advice = rf'"({"|".join(keys)})": (?:\["([^"]*)"\]|"([^"]*)"|(\{{[^}}]*\}}))'
        found = [(key, "".join(value)) for key, *value in re.findall(advice, str(error))]
        if not found:
            raise
        options = ", ".join(f"--{key} {shlex.quote(value)}" for key, value in found)
        raise UserError(*error.args, f"as options of this command: {options}") from None
