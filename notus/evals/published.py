"""Published results, as data: the rows that a run is compared with.

Numbers are as printed by their source; a None was not published.
"""

from collections.abc import Mapping
from typing import NamedTuple

# ------------------------------------------------------------------------------------ AlpacaEval

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


# By the baseline's name. alpaca_eval/leaderboards: data_AlpacaEval/alpaca_eval_gpt4 (version 1)
# and data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo (version 2, which never had Notus).
ALPACA_EVAL_1, ALPACA_EVAL_2 = "text_davinci_003", "gpt4_turbo"
ALPACA_EVAL: Mapping[str, tuple[WinRate, ...]] = {
    ALPACA_EVAL_1: (
        WinRate("notus-7b-v1", 91.4179104, 0.9884493, 735, 69, 0, 804, 2139),
        WinRate("zephyr-7b-beta", 90.5977584, 1.0287081, 727, 75, 1, 803, 1444),
    ),
    ALPACA_EVAL_2: (
        WinRate("zephyr-7b-beta", 10.9928858, 0.9617877, 78, 725, 2, 805, 1444, 13.2031985),
    ),
}
# The names of the two baselines in AlpacaEval's own files.
BASELINES = {
    "text_davinci_003": ALPACA_EVAL_1,
    "gpt4_turbo": ALPACA_EVAL_2,
    "gpt4_1106_preview": ALPACA_EVAL_2,
}

# -------------------------------------------------------------------------------------- MT-Bench

# FastChat's 80 questions have the ids 81 to 160, ten of each category in this order.
MT_BENCH_CATEGORIES = {
    81 + 10 * place + i: category
    for place, category in enumerate(
        "writing roleplay reasoning math coding extraction stem humanities".split()
    )
    for i in range(10)
}

# Mean over both turns, judged by GPT-4: the model cards of argilla/notus-7b-v1 and
# HuggingFaceH4/zephyr-7b-beta.
MT_BENCH = {"notus-7b-v1": 7.30, "zephyr-7b-beta": 7.34}

# -------------------------------------------------------------------------- Open LLM Leaderboard


class LeaderboardTask(NamedTuple):
    """A task of the Open LLM Leaderboard of November 2023."""

    name: str  # in lm-evaluation-harness today, as its metric
    title: str
    few_shot: int
    metric: str
    in_2023: tuple[str, str]  # how the leaderboard's own results call task and metric


LEADERBOARD_TASKS = (
    LeaderboardTask("arc_challenge", "ARC", 25, "acc_norm,none", ("arc:challenge", "acc_norm")),
    LeaderboardTask("hellaswag", "HellaSwag", 10, "acc_norm,none", ("hellaswag", "acc_norm")),
    LeaderboardTask("mmlu", "MMLU", 5, "acc,none", ("hendrycksTest-", "acc")),
    LeaderboardTask("truthfulqa_mc2", "TruthfulQA", 0, "acc,none", ("truthfulqa:mc", "mc2")),
    LeaderboardTask("winogrande", "Winogrande", 5, "acc,none", ("winogrande", "acc")),
    LeaderboardTask("gsm8k", "GSM8K", 5, "exact_match,strict-match", ("gsm8k", "acc")),
    LeaderboardTask("drop", "DROP", 3, "f1,none", ("drop", "f1")),
)
MMLU_SUBTASKS = 57  # each with results of its own in 2023


class LeaderboardRow(NamedTuple):
    """A model's scores in percent, in the order of LEADERBOARD_TASKS."""

    model: str
    measured_by: str
    scores: tuple[float | None, ...]


# The leaderboard's from the model card of argilla/notus-7b-v1; Argilla's own with the harness's
# branch big-refactor, which became 0.4.0, from the repository argilla-io/notus. GSM8K and DROP
# differ because the leaderboard's version stopped answers at other strings. TruthfulQA's questions
# are in the training data of both models.
LEADERBOARD = (
    LeaderboardRow("notus-7b-v1", "leaderboard", (64.59, 84.78, 63.03, 54.37, 79.40, 15.16, 8.91)),
    LeaderboardRow(
        "notus-7b-v1", "harness 0.4.0", (64.25, 84.90, 61.69, 52.77, 74.51, 39.50, 0.98)
    ),
    LeaderboardRow(
        "zephyr-7b-beta", "leaderboard", (62.03, 84.36, 61.07, 57.45, 77.74, 12.74, 9.66)
    ),
)

# ----------------------------------------------------------------------------------- DPO metrics


class DpoMetrics(NamedTuple):
    """A published evaluation on held-out pairs. Log-probs and rewards in nats, as TRL logs them."""

    loss: float
    accuracy: float
    margin: float
    rewards_chosen: float | None = None
    rewards_rejected: float | None = None
    logps_chosen: float | None = None
    logps_rejected: float | None = None


class DpoRun(NamedTuple):
    """A published DPO run: its evaluations at step 100 and at the end, and its recipe.

    The loss is over all `pairs` held-out pairs. The rewards, their accuracy and margin are over
    only the `reward_pairs` of them that the first process saw, because TRL's trainer averaged no
    others then (huggingface/trl issue 2468): 0.8016 is 202 of 252.
    """

    source: str
    pairs: int
    reward_pairs: int
    recipe: Mapping[str, float | int | str]  # configuration keys
    end: DpoMetrics
    step_100: DpoMetrics | None = None


NOTUS_RECIPE = {
    "loss.name": "sigmoid",
    "loss.beta": 0.1,
    "optimizer.learning_rate": 5e-7,
    "schedule.name": "linear",
    "train.epochs": 3,
    "train.pairs_per_step": 64,
}

DPO_RUNS: Mapping[str, DpoRun] = {
    "notus-7b-v1": DpoRun(
        source="model card of argilla/notus-7b-v1, revision e24828f",
        pairs=2000,
        reward_pairs=252,
        recipe=NOTUS_RECIPE,
        end=DpoMetrics(0.4730, 0.8016, 3.8412, -3.5289, -7.3700, -334.31, -316.38),
        step_100=DpoMetrics(0.5180, 0.7183, 0.5429, 0.1475, -0.3954, -297.54, -246.63),
    ),
    "notus-7b-v1-lora": DpoRun(
        source="model card of argilla/notus-7b-v1-lora",
        pairs=2000,
        reward_pairs=252,
        recipe=NOTUS_RECIPE | {"train.pairs_per_step": 512},
        end=DpoMetrics(0.6432, 0.6984, 0.1007, 0.0663, -0.0344, -298.37, -242.99),
    ),
    "zephyr-7b-beta": DpoRun(
        source="model card of HuggingFaceH4/zephyr-7b-beta",
        pairs=2000,
        reward_pairs=256,
        recipe=NOTUS_RECIPE | {"train.pairs_per_step": 32},
        end=DpoMetrics(0.7496, 0.7812, 3.7963, -4.5221, -8.3184, -299.46, -340.15),
        step_100=DpoMetrics(0.6098, 0.7344, 0.2297),
    ),
    "zephyr-7b-dpo-full": DpoRun(
        source="model card of alignment-handbook/zephyr-7b-dpo-full, revision c1a1250",
        pairs=2000,
        reward_pairs=256,
        recipe=NOTUS_RECIPE
        | {
            "loss.beta": 0.01,
            "schedule.name": "cosine",
            "train.epochs": 1,
            "train.pairs_per_step": 128,
        },
        end=DpoMetrics(0.5028, 0.7656, 0.9463, -0.9469, -1.8932, -357.23, -451.47),
    ),
}
