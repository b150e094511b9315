"""The evaluators' own output files -> the rows of Notus's table, next to the published ones.

    python eval.py score alpaca_eval annotations.json
    python eval.py score mt_bench gpt-4_single.jsonl
    python eval.py score lm_eval RESULTS_DIR

The files are those of AlpacaEval 0.6.6, FastChat 0.2.36 and lm-evaluation-harness 0.4.13.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from notus.evals.alpaca_eval import score_alpaca_eval
from notus.evals.leaderboard import report_lm_eval, result_files
from notus.evals.mt_bench import score_mt_bench
from notus.evals.options import add_json_option


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "read an evaluator's output files, print the row of the table"
    score = commands.add_parser("score", help=about, description=about)
    evaluators = score.add_subparsers(metavar="EVALUATOR", required=True)

    def evaluator(name: str, run: Callable, file: str, about: str) -> argparse.ArgumentParser:
        parser = evaluators.add_parser(name, help=about, description=about)
        parser.add_argument("file", type=Path, help=file)
        add_json_option(parser)
        parser.set_defaults(run=run)
        return parser

    about = "win rate, standard error and length from AlpacaEval's annotations"
    evaluator("alpaca_eval", score_alpaca_eval, "its annotations.json", about)
    file = "its model_judgment/gpt-4_single.jsonl"
    about = "mean score over both turns, and per category, from FastChat's judgments"
    mt_bench = evaluator("mt_bench", score_mt_bench, file, about)
    about = "question.jsonl, if the questions are not MT-Bench's own 80"
    mt_bench.add_argument("--questions", type=Path, help=about)
    file = "its results file, or a folder of these"
    about = "the Open LLM Leaderboard's tasks and average from lm-evaluation-harness's results"
    evaluator("lm_eval", score_lm_eval, file, about)


def score_lm_eval(options: argparse.Namespace) -> None:
    report_lm_eval(result_files(options.file), options.json)
