"""The best checkpoint of a run by one metric of held-out pairs, which is kept next to the newest.

A checkpoint is judged by the evaluation at its own step. Its state.json records the best one up to
then, itself included, so a resumed run decides as one that was never interrupted.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from notus.data.token_arrays import TokenizedPairs
from notus.engine.checkpoint import checkpoint_name, newest_state
from notus.engine.log import warn
from notus.engine.metrics import summarize
from notus.errors import UserError
from notus.files import Plain
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs, Sums

# Whether a higher value is better, for each metric of an evaluation.
HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "logps/chosen": True,
    "logps/rejected": False,
    "displacement/chosen_falling": False,
    "displacement/chosen_per_token": True,
    "displacement/rejected_per_token": False,
}


class Best:
    """The best checkpoint so far by `metric`, a name such as "eval_loss" or "eval_NAME/loss".

    record: {"metric", "pairs_sha256", "step", "value"} of it, or None before one was judged. A tie
    leaves the earlier one the best; a value that is not finite is never the best.
    """

    def __init__(self, metric: str, pairs: TokenizedPairs) -> None:
        self._about = {"metric": metric, "pairs_sha256": pairs.fingerprint()}
        self._higher = HIGHER_IS_BETTER[base_name(metric)]
        self._seen: tuple[int, float] | None = None  # step and value of the last evaluation
        self.record: Plain | None = None

    def resume(self, record: Plain | None, root: Path) -> None:
        """Take over a checkpoint's record, if it is of this metric and these pairs.

        root: the folder of checkpoints. A record whose checkpoint is gone is dropped, with a
        warning. Collective.
        """
        if record is None or record | self._about != record:
            return
        found = [(root / checkpoint_name(record["step"])).is_dir()]
        dist.broadcast_object_list(found, 0)  # a shared file system may show the ranks others
        if found[0]:
            self.record = record
        elif dist.get_rank() == 0:
            warn(f"{root / checkpoint_name(record['step'])}, the best checkpoint, is gone")

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the evaluation after `step` steps."""
        self._seen = step, metrics[self._about["metric"]]

    def after(self, step: int) -> Plain | None:
        """The record once the checkpoint of this step, whose evaluation was noted, is complete."""
        seen, value = self._seen or (-1, math.nan)
        if seen != step or not math.isfinite(value):
            return self.record
        if self.record is not None:
            gain = value - self.record["value"]
            if (gain if self._higher else -gain) <= 0:
                return self.record
        return self._about | {"step": step, "value": value}

    def folder(self, root: Path) -> Path | None:
        """The best checkpoint's folder, among the checkpoints in `root`."""
        return root / checkpoint_name(self.record["step"]) if self.record else None


def base_name(metric: str) -> str:
    """The metric's name in training: without eval_, or eval_NAME/ of a named set."""
    name = metric.removeprefix("eval_")
    return name if name in HIGHER_IS_BETTER else name.partition("/")[2]


def check_metric(metric: str, loss: Loss, sets: Collection[str]) -> None:
    """Raise UserError for a metric that no evaluation has, or whose direction is not known.

    sets: the names of evaluation sets.
    """
    names = metric_names(loss)
    valid = [f"{part}{name}" for part in ("eval_", *(f"eval_{s}/" for s in sets)) for name in names]
    if metric not in valid:
        expected = ", ".join(valid)
        raise UserError(f'evaluation.best: found "{metric}", expected one of {expected}')
    if base_name(metric) not in HIGHER_IS_BETTER:
        raise UserError(
            f'evaluation.best: found "{metric}", a metric whose better direction is not known; add '
            "it to notus/engine/best.py"
        )


def metric_names(loss: Loss) -> list[str]:
    """The names of all metrics that an evaluation with this loss has, without prefix."""
    one = torch.ones(1, dtype=torch.float64)
    sums = Sums(-one, -one, -one, -one)
    return list(summarize(PairLogProbs(sums, sums, one, one, one[0], one, one), loss))


def best_step(root: Path) -> int | None:
    """The step of the best checkpoint, by the newest one's record; None without one."""
    newest = newest_state(root)
    record = newest and newest[1].get("best")
    return record["step"] if record else None
