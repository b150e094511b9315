"""What the ranks must find alike: a user's mistake that one of them meets ends all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from notus.errors import UserError

Result = TypeVar("Result")


def agree(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank; a UserError on any rank is raised on all of them.

    Without this, ranks that found nothing wrong would wait for the failed one in a collective.
    """
    result, problem = None, None
    try:
        result = function()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise UserError(found)
    return result
