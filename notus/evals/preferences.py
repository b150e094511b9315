"""How often a model prefers the chosen response: `eval.py preferences`.

The score of a response is the log-prob of its tokens under the model, minus that under the
reference if there is one (the implicit reward of DPO without beta, arXiv 2305.18290; RewardBench
counts the same way, arXiv 2403.13787). A pair is right if the chosen response's score is strictly
higher; a tie is wrong. Pairs are tokenized, packed and scored by the functions that train.py uses.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from notus.build import Setup, build_model, make_loss, set_up
from notus.config import Config
from notus.console import drawing, emit
from notus.curation.ratings import RULES
from notus.curation.report import look_command
from notus.data.oddities import oddities
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.engine.metrics import all_log_probs, summarize
from notus.engine.pair_records import describe_pairs, pair_records
from notus.errors import UserError, agreed, naming_options
from notus.evals.accuracy import Row, section_scores, table
from notus.evals.options import NewPath, model_path
from notus.files import new_folder, write_json, write_whole
from notus.model.hf_config import read_shape
from notus.model.weights import load_weights, open_model
from notus.objective.logprobs import score
from notus.objective.losses import log_ratios
from notus.objective.reference import no_reference
from notus.strict import parse, read_option
from notus.tables import markdown_table, text_table


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "preferences",
        help="how often a model prefers the chosen response",
        description="Accuracy, margin and loss on preference pairs; also under torchrun.",
    )
    styles, dtypes = ("clean", "trl-0.7.4"), ("bfloat16", "float32")
    add = parser.add_argument
    add("model", type=model_path, help="folder, a run's output_dir, or hub id")
    about = "another of these; without it only the model's log-probs decide"
    add("--reference", type=model_path, help=about)
    add("--data", nargs="+", required=True, help="files, folders or hub ids")
    add("--split", help="of the data, where it has splits")
    add("--format", help="of the data (default: recognized from the rows)")
    add("--columns", metavar="JSON", help='as in a training source, e.g. {"prompt": "Question"}')
    add("--ignore", nargs="+", metavar="NAME", help="columns and keys of messages to leave out")
    add("--rule", choices=RULES, help="how rated responses become pairs")
    add("--out", type=Path, action=NewPath, required=True, help="a new folder for the results")
    add("--loss", default="sigmoid", help="a name of objective/losses.py")
    add("--beta", type=float, help="of the loss and the margin (default: the loss's)")
    add("--max-length", type=int, default=1024, help="tokens (1024)")
    add("--max-prompt-length", type=int, default=512, help="tokens (512)")
    add("--tokenization", choices=styles, default="clean")
    add("--system-prompt", help='system turn of rows without one ("": empty)')
    add("--tokens-per-microbatch", type=int, default=8192)
    add("--compute-dtype", choices=dtypes, default="bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=run)


def configuration(options: argparse.Namespace) -> Config:
    """The options as the configuration of a run. Raises UserError that names the key."""

    def given(*keys: str) -> dict[str, Any]:
        return {key: value for key, value in vars(options).items() if key in keys}

    source = given("split", "format", "ignore")
    source |= {"columns": read_option("--columns", options.columns)}
    source |= {"curation": options.rule and {"rule": options.rule}}
    data = given("max_length", "max_prompt_length", "tokens_per_microbatch")
    data |= given("tokenization", "system_prompt")
    sections = {
        "model": {"policy": options.model} | given("reference", "compute_dtype"),
        "data": data | {"train": [source | {"path": path} for path in options.data]},
        "loss": {"name": options.loss} | ({} if options.beta is None else given("beta")),
        "parallel": given("device"),
        "output_dir": str(options.out),
    }
    return parse(sections, Config)


@naming_options("format", "columns", "ignore", "rule")
def run(options: argparse.Namespace) -> None:
    """The command `preferences`: writes --out and prints the report."""
    config = configuration(options)
    loss, referenced = make_loss(config), options.reference is not None
    if loss.uses_reference and not referenced and options.loss != "sigmoid":
        raise UserError(f"--loss {options.loss}: needs --reference")
    ranks = distributed.start(options.device)
    with agreed():
        open_model(options.model)  # refuses an adapter, which would have to be merged
    setup, datasets = set_up(config, ranks, "evaluation")
    data = datasets["train"]
    with agreed():
        has_template = load_tokenizer(setup.models.tokenizer).chat_template is not None
        for line in oddities(config.data.train, data.rows, has_template) if ranks.first else ():
            ranks.say(f"warning: {line}")
    policy = log_probs(setup, setup.models.source, loss.uses_weights)
    reference = no_reference(data.pairs, ranks.device).flat
    if referenced:
        reference = log_probs(setup, setup.models.reference)
    scored = all_log_probs(policy, reference, data.pairs)
    scores = [score.cpu().numpy() for score in log_ratios(scored)]
    margin = (loss.beta if referenced else 1.0) * (scores[0] - scores[1])
    metrics = summarize(scored, loss)
    if loss.uses_reference and not referenced:
        # Without a reference only the log-probs and their order are meaningful.
        metrics = {k: v for k, v in metrics.items() if k.startswith("logps/")}
        metrics |= {"accuracy": float((margin > 0).mean()), "margin": float(margin.mean())}
    rows = table(data.kept, margin, data.pairs.lengths)
    sections = section_scores(rows)
    against = f"against {options.reference}" if referenced else "without a reference"
    title = f"Preferences of {options.model}, {against}"
    report = f"# {title}\n\n{tables(markdown_table, metrics, rows, sections)}\n"
    if not ranks.first:
        return
    with new_folder(options.out) as new:
        (new / "report.md").write_text(report)
        summary = {
            "model": options.model,
            "reference": options.reference,
            "data": options.data,
            "loss": loss.settings,
            "metrics": metrics,
            "rows": [row._asdict() for row in rows],
            "sections": sections,
        }
        write_json(new / "summary.json", summary)
        with (new / "pairs.jsonl").open("w") as file:
            for record in pair_records(describe_pairs(data), scored, loss, referenced):
                file.write(json.dumps(record) + "\n")
    with drawing():  # the results are there before any figure
        drawn = "".join(f"\n![{n}]({n})\n" for n in figures(options.out, rows, margin, *scores))
        write_whole(options.out / "report.md", report + drawn)
    emit(f"\n{title}\n\n{tables(partial(text_table, digits=4), metrics, rows, sections)}\n")
    emit(f"wrote {options.out}; look at the pairs:\n  {look_command(options.out)}")


def log_probs(setup: Setup, folder: Path, sum_squares: bool = False) -> torch.Tensor:
    """The log-probs of all response tokens under the model in `folder`, flat; see `score`."""
    model = build_model(setup, read_shape(folder), frozen=True)
    with agreed():
        load_weights(model, folder)
    return score(model, setup.pairs, range(len(setup.pairs)), setup.rows, sum_squares)


def tables(
    form: Callable[..., str],
    metrics: Mapping[str, float],
    rows: Sequence[Row],
    sections: Mapping[str, float],
) -> str:
    """The tables of one evaluation. form: `text_table` or `markdown_table`."""
    header = ("pairs", "n", "accuracy", "95 % interval", "margin", "longer response wins")
    cells = [
        (
            row.name if row.kind == "all" else f"{row.kind}: {row.name}",
            *(row.n, row.accuracy, f"{row.low:.4f} to {row.high:.4f}", row.margin, row.longer_wins),
        )
        for row in rows
    ]
    parts = [form(("metric", "value"), metrics.items()), form(header, cells)]
    if sections:
        parts.append(form(("RewardBench section", "accuracy"), sections.items()))
    return "\n\n".join(parts)


def figures(
    folder: Path, rows: Sequence[Row], margin: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> list[str]:
    """Draw accuracy by length difference and histograms of the scores. Returns the files' names.

    chosen, rejected: float64 [pairs], the responses' scores. Without matplotlib nothing is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    shown = [row for row in rows if row.kind == "chosen longer by (tokens)"]
    plot = Figure(figsize=(7, 1.4 + 0.45 * max(len(shown), 3)), layout="constrained")
    axes = plot.subplots()
    places = np.arange(len(shown))
    spans = np.array([[row.accuracy - row.low, row.high - row.accuracy] for row in shown]).T
    axes.barh(places, [row.accuracy for row in shown], xerr=spans, capsize=3, color="tab:blue")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle="dotted")
    axes.set_yticks(places, [f"{row.name} (n = {row.n:,})" for row in shown])
    axes.set(ylabel="tokens by which chosen is longer", xlabel="accuracy", xlim=(0, 1.02))
    axes.invert_yaxis()
    plot.savefig(folder / "accuracy_by_length.png", dpi=120)

    plot = Figure(figsize=(10, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    bins = np.histogram_bin_edges(np.concatenate((chosen, rejected)), bins=40)
    left.hist(chosen, bins, alpha=0.6, label="chosen")
    left.hist(rejected, bins, alpha=0.6, label="rejected")
    left.set(xlabel="score (nats)", ylabel="pairs")
    left.legend()
    right.hist(margin, bins=40, color="tab:green")
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="margin, chosen - rejected", ylabel="pairs")
    plot.savefig(folder / "scores.png", dpi=120)
    return ["accuracy_by_length.png", "scores.png"]
