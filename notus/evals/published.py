"""Published results, as data: the rows that a run is compared with.

Numbers are as printed by their source; a None was not published.
"""

from collections.abc import Mapping
from typing import NamedTuple

ALPACA_EVAL_PROMPTS = 805


class WinRate(NamedTuple):
    """One model's comparisons with the baseline: rates in percent, lengths in characters."""

    model: str
    win_rate: float
    standard_error: float | None
    wins: int | None = None
    losses: int | None = None
    draws: int | None = None
    total: int | None = None  # comparisons that were annotated
    average_length: int | None = None
    length_controlled: float | None = None  # AlpacaEval 2's, percent


# By the baseline's name in AlpacaEval's own files. Zephyr's: alpaca_eval/leaderboards in 0.6.6,
# data_AlpacaEval/alpaca_eval_gpt4 and data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo. Neither
# has Notus: its row follows from the annotations in the repository argilla-io/notus.
ALPACA_EVAL: dict[str, tuple[WinRate, ...]] = {
    "text_davinci_003": (
        WinRate("notus-7b-v1", 91.4179104, 0.9884493, 735, 69, 0, 804, 2139),
        WinRate("zephyr-7b-beta", 90.5977584, 1.0287081, 727, 75, 1, 803, 1444),
    ),
    "gpt4_turbo": (
        WinRate("zephyr-7b-beta", 10.9928858, 0.9617877, 78, 725, 2, 805, 1444, 13.2031985),
    ),
}
ALPACA_EVAL["gpt4_1106_preview"] = ALPACA_EVAL["gpt4_turbo"]

# (question id, turn) -> category of FastChat's 80 questions, ten of each category in this order.
CATEGORIES = "writing roleplay reasoning math coding extraction stem humanities".split()
MT_BENCH_TURNS = {(81 + i, turn): CATEGORIES[i // 10] for i in range(80) for turn in (1, 2)}

# Mean over both turns, judged by GPT-4: the model cards of argilla/notus-7b-v1 and
# HuggingFaceH4/zephyr-7b-beta.
MT_BENCH = {"notus-7b-v1": 7.30, "zephyr-7b-beta": 7.34}


class LeaderboardTask(NamedTuple):
    """A task of the Open LLM Leaderboard of November 2023."""

    title: str
    few_shot: int
    metric: str  # in lm-evaluation-harness today
    in_2023: tuple[str, str]  # how the leaderboard's own results call task and metric


LEADERBOARD_TASKS = {  # by their names in lm-evaluation-harness today
    "arc_challenge": LeaderboardTask("ARC", 25, "acc_norm,none", ("arc:challenge", "acc_norm")),
    "hellaswag": LeaderboardTask("HellaSwag", 10, "acc_norm,none", ("hellaswag", "acc_norm")),
    "mmlu": LeaderboardTask("MMLU", 5, "acc,none", ("hendrycksTest-", "acc")),
    "truthfulqa_mc2": LeaderboardTask("TruthfulQA", 0, "acc,none", ("truthfulqa:mc", "mc2")),
    "winogrande": LeaderboardTask("Winogrande", 5, "acc,none", ("winogrande", "acc")),
    "gsm8k": LeaderboardTask("GSM8K", 5, "exact_match,strict-match", ("gsm8k", "acc")),
    "drop": LeaderboardTask("DROP", 3, "f1,none", ("drop", "f1")),
}


class BoardRow(NamedTuple):
    """A model's scores in percent, in the order of LEADERBOARD_TASKS."""

    model: str
    measured_by: str
    scores: tuple[float | None, ...]


# The leaderboard's from the model card of argilla/notus-7b-v1; Argilla's own with the harness's
# branch big-refactor, which became 0.4.0, from the repository argilla-io/notus. GSM8K and DROP
# differ because the leaderboard's version stopped answers at other strings. TruthfulQA's questions
# are in the training data of both models.
LEADERBOARD = (
    BoardRow("notus-7b-v1", "leaderboard", (64.59, 84.78, 63.03, 54.37, 79.40, 15.16, 8.91)),
    BoardRow("notus-7b-v1", "harness 0.4.0", (64.25, 84.90, 61.69, 52.77, 74.51, 39.50, 0.98)),
    BoardRow("zephyr-7b-beta", "leaderboard", (62.03, 84.36, 61.07, 57.45, 77.74, 12.74, 9.66)),
)

# The metrics of an evaluation on held-out pairs, and their names in a run's metrics.jsonl.
METRICS = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "rewards_chosen": "eval_rewards/chosen",
    "rewards_rejected": "eval_rewards/rejected",
    "logps_chosen": "eval_logps/chosen",
    "logps_rejected": "eval_logps/rejected",
}

NOTUS_RECIPE = {
    "loss.name": "sigmoid",
    "loss.beta": 0.1,
    "optimizer.learning_rate": 5e-7,
    "schedule.name": "linear",
    "train.epochs": 3,
    "train.pairs_per_step": 64,
}


class DpoRun(NamedTuple):
    """A published DPO run: its evaluations at the end and at step 100, and its recipe.

    end, step_100: by METRICS; log-probs and rewards in nats, as TRL logs them. recipe:
    configuration keys. The loss is over all `pairs` held-out pairs. The rewards, their accuracy and
    margin are over only the `reward_pairs` of them that the first process saw, because TRL's
    trainer averaged no others then (huggingface/trl issue 2468): 0.8016 is 202 of 252.
    """

    source: str
    reward_pairs: int
    end: Mapping[str, float]
    step_100: Mapping[str, float] | None = None
    recipe: Mapping[str, float | int | str] = NOTUS_RECIPE
    pairs: int = 2000


def _metrics(*values: float) -> dict[str, float]:
    return dict(zip(METRICS, values, strict=False))


DPO_RUNS = {
    "notus-7b-v1": DpoRun(
        "model card of argilla/notus-7b-v1, revision e24828f",
        reward_pairs=252,
        end=_metrics(0.4730, 0.8016, 3.8412, -3.5289, -7.3700, -334.31, -316.38),
        step_100=_metrics(0.5180, 0.7183, 0.5429, 0.1475, -0.3954, -297.54, -246.63),
    ),
    "notus-7b-v1-lora": DpoRun(
        "model card of argilla/notus-7b-v1-lora",
        reward_pairs=252,
        end=_metrics(0.6432, 0.6984, 0.1007, 0.0663, -0.0344, -298.37, -242.99),
        recipe=NOTUS_RECIPE | {"train.pairs_per_step": 512},
    ),
    "zephyr-7b-beta": DpoRun(
        "model card of HuggingFaceH4/zephyr-7b-beta",
        reward_pairs=256,
        end=_metrics(0.7496, 0.7812, 3.7963, -4.5221, -8.3184, -299.46, -340.15),
        step_100=_metrics(0.6098, 0.7344, 0.2297),
        recipe=NOTUS_RECIPE | {"train.pairs_per_step": 32},
    ),
    "zephyr-7b-dpo-full": DpoRun(
        "model card of alignment-handbook/zephyr-7b-dpo-full, revision c1a1250",
        reward_pairs=256,
        end=_metrics(0.5028, 0.7656, 0.9463, -0.9469, -1.8932, -357.23, -451.47),
        recipe=NOTUS_RECIPE
        | {"loss.beta": 0.01, "schedule.name": "cosine"}
        | {"train.epochs": 1, "train.pairs_per_step": 128},
    ),
}
