"""How often a model prefers the chosen response: `eval.py preferences`.

The score of a response is the log-prob of its tokens under the model, minus that under the
reference if there is one (the implicit reward of DPO without beta, arXiv 2305.18290; RewardBench
counts the same way, arXiv 2403.13787). A pair is right if the chosen response's score is strictly
higher; a tie is wrong. Pairs are tokenized, packed and scored by the functions that train.py uses.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from notus.config import Curation, Source
from notus.curation.ratings import RULES
from notus.data.dataset import Dataset, load_datasets
from notus.data.formats import Pair
from notus.data.packing import Rows
from notus.data.tokenization import TokenizedPairs
from notus.engine import distributed
from notus.engine.distributed import Ranks, map_over_ranks
from notus.engine.metrics import all_log_probs, summarize
from notus.errors import UserError, agreed
from notus.evals.accuracy import Row, groups, section_scores, table
from notus.files import new_folder, write_json
from notus.generate.answering import open_answerer
from notus.model.hf_config import ModelShape
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights, open_model
from notus.objective.logprobs import score
from notus.objective.loss import Loss, build_loss
from notus.objective.losses import PairLogProbs, log_ratios, margin
from notus.tables import markdown_table


def margins(scored: PairLogProbs, beta: float) -> np.ndarray:
    """beta x (chosen's score - rejected's): float64 [pairs]. Without a reference its sums are 0."""
    return (beta * margin(scored)).cpu().numpy()


def as_markdown(
    title: str, metrics: Mapping[str, float], rows: Sequence[Row], sections: Mapping[str, float]
) -> str:
    """The report of one evaluation."""
    header = ("pairs", "n", "accuracy", "95 % interval", "margin", "longer response wins")
    cells = [
        (
            row.name if row.kind == "all" else f"{row.kind}: {row.name}",
            *(row.n, row.accuracy, f"{row.low:.4f} to {row.high:.4f}", row.margin, row.longer_wins),
        )
        for row in rows
    ]
    tables = [markdown_table(("metric", "value"), metrics.items()), markdown_table(header, cells)]
    if sections:
        tables.append(markdown_table(("RewardBench section", "accuracy"), sections.items()))
    return "\n\n".join([f"# {title}", *tables]) + "\n"


def pair_records(
    pairs: Sequence[Pair], lengths: np.ndarray, scored: PairLogProbs, referenced: bool
) -> Iterator[dict[str, Any]]:
    """One object per pair: its origin, its log-probs (nats) and whether it is right."""
    margin = margins(scored, 1.0)
    models = {"policy": scored.policy} | ({"reference": scored.reference} if referenced else {})
    sums = {}
    for name, found in models.items():
        sums |= {
            f"{name}_chosen": found.chosen.tolist(),
            f"{name}_rejected": found.rejected.tolist(),
        }
    for i, pair in enumerate(pairs):
        yield {
            "where": pair.where,
            **pair.labels,
            **{name: values[i] for name, values in sums.items()},
            "chosen_tokens": int(lengths[i, 1]),
            "rejected_tokens": int(lengths[i, 2]),
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "right": bool(margin[i] > 0),
        }


def figures(
    folder: Path, rows: Sequence[Row], margin: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> list[str]:
    """Draw accuracy by length difference and histograms of the scores. Returns the files' names.

    chosen, rejected: float64 [pairs], the responses' scores. Without matplotlib nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    shown = [row for row in rows if row.kind == "chosen longer by (tokens)"]
    middles = np.arange(len(shown))
    spans = np.array([[row.accuracy - row.low, row.high - row.accuracy] for row in shown]).T
    axes.bar(middles, [row.accuracy for row in shown], yerr=spans, capsize=3, color="tab:blue")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="dotted")
    axes.set_xticks(middles, [f"{row.name}\nn = {row.n:,}" for row in shown], fontsize=8)
    axes.set(xlabel="tokens by which the chosen response is longer", ylabel="accuracy", ylim=(0, 1))
    plot.savefig(folder / "accuracy_by_length.png", dpi=120)
    pyplot.close(plot)

    plot, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate((chosen, rejected)), bins=40)
    left.hist(chosen, bins, alpha=0.6, label="chosen")
    left.hist(rejected, bins, alpha=0.6, label="rejected")
    left.set(xlabel="score (nats)", ylabel="pairs")
    left.legend()
    right.hist(margin, bins=40, color="tab:green")
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="margin, chosen - rejected", ylabel="pairs")
    plot.savefig(folder / "scores.png", dpi=120)
    pyplot.close(plot)
    return ["accuracy_by_length.png", "scores.png"]


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `preferences` to the command line."""
    parser = commands.add_parser(
        "preferences",
        help="how often a model prefers the chosen response",
        description="Accuracy, margin and loss on preference pairs; also under torchrun.",
    )
    styles, dtypes = ("clean", "trl-0.7.4"), ("bfloat16", "float32")
    add = parser.add_argument
    add("model", help="folder or hub id")
    add("--reference", help="folder or hub id; without it only the model's log-probs decide")
    add("--data", nargs="+", required=True, help="files, folders or hub ids")
    add("--split", help="of the data, where it has splits")
    add("--format", help="of the data (default: recognized from the rows)")
    add("--rule", choices=RULES, help="how rated responses become pairs")
    add("--out", type=Path, required=True, help="a new folder for the results")
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


def run(options: argparse.Namespace) -> None:
    """The command `preferences`: writes --out and prints the report."""
    loss = _loss(options)
    if min(options.max_length, options.max_prompt_length, options.tokens_per_microbatch) < 1:
        raise UserError("--max-length, --max-prompt-length, --tokens-per-microbatch: expected >= 1")
    if options.out.exists():
        raise UserError(f"--out {options.out}: exists already; expected a new folder")
    ranks = distributed.start(options.device)
    try:
        _evaluate(options, loss, ranks)
    finally:
        distributed.stop()


def _loss(options: argparse.Namespace) -> Loss:
    loss = build_loss(
        {"name": options.loss} | ({} if options.beta is None else {"beta": options.beta})
    )
    if loss.uses_reference and options.reference is None and options.loss != "sigmoid":
        raise UserError(f"--loss {options.loss}: needs --reference")
    return loss


def _evaluate(options: argparse.Namespace, loss: Loss, ranks: Ranks) -> None:
    reference = None
    with agreed():
        source, tokenizer, shape = open_answerer(options.model)
        if options.reference is not None:
            reference = open_model(options.reference)
            if reference[1].vocab_size != shape.vocab_size:
                raise UserError(
                    f"--reference {options.reference}: its vocabulary has "
                    f"{reference[1].vocab_size} tokens, the model's {shape.vocab_size}; expected "
                    "the same"
                )
    data = _load(options, tokenizer)
    kept, tokens = data.kept, data.pairs
    ranks.say(f"{len(kept):,} pairs{data.notes}")

    policy_flat = _log_probs(options, ranks, source, shape, tokens, loss.uses_weights)
    reference_flat = torch.zeros_like(policy_flat if policy_flat.dim() == 1 else policy_flat[0])
    if reference is not None:
        reference_flat = _log_probs(options, ranks, *reference, tokens)
    scored = all_log_probs(policy_flat, reference_flat, tokens)
    beta = loss.beta if reference is not None else 1.0
    margin = margins(scored, beta)
    metrics = summarize(scored, loss)
    if reference is None and loss.uses_reference:
        # Without a reference only the log-probs and their order are meaningful.
        metrics = {k: v for k, v in metrics.items() if k.startswith("logps/")}
        metrics |= {"accuracy": float((margin > 0).mean()), "margin": float(margin.mean())}
    rows = table(list(groups(kept, tokens.lengths)), margin, tokens.lengths)
    sections = section_scores(rows)
    against = f"against {options.reference}" if reference else "without a reference"
    report = as_markdown(f"Preferences of {options.model}, {against}", metrics, rows, sections)
    if ranks.first:
        summary = {
            "model": options.model,
            "reference": options.reference,
            "data": options.data,
            "loss": loss.settings,
            "metrics": metrics,
            "rows": [row._asdict() for row in rows],
            "sections": sections,
        }
        records = pair_records(kept, tokens.lengths, scored, reference is not None)
        _write(options.out, report, summary, records, rows, margin, log_ratios(scored))
    ranks.say(f"\n{report}\nwrote {options.out}")


def _load(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The pairs to score. Collective."""
    curation = None if options.rule is None else Curation(rule=options.rule)
    sources = [
        Source(path=path, split=options.split, format=options.format, curation=curation)
        for path in options.data
    ]
    tokenization = {
        "style": options.tokenization,
        "truncation": "pair",
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "system_prompt": options.system_prompt,
    }
    return load_datasets(
        sources,
        (),
        tokenizer,
        tokenization=tokenization,
        prefix_sharing=True,
        tokens_per_microbatch=options.tokens_per_microbatch,
        map_over_ranks=map_over_ranks,
        seed=0,
    )["train"]


def _log_probs(
    options: argparse.Namespace,
    ranks: Ranks,
    folder: Path,
    shape: ModelShape,
    pairs: TokenizedPairs,
    sum_squares: bool = False,
) -> torch.Tensor:
    """The log-probs of all response tokens under the model in `folder`, flat; see `score`."""
    dtype = getattr(torch, options.compute_dtype)
    with torch.device("meta"):
        model = MistralForCausalLM(shape).to(dtype)
    model.requires_grad_(False)
    distributed.shard_model(
        model,
        distributed.make_mesh(ranks, None, 1),
        ranks.device,
        compute_dtype=dtype,
        activation_checkpointing="none",
        compile_blocks=ranks.device.type == "cuda",
        cpu_offload=False,
    )
    with agreed():
        load_weights(model, folder)
    rows = Rows(options.tokens_per_microbatch, prefix_sharing=True, device=ranks.device)
    return score(model, pairs, range(len(pairs)), rows, sum_squares)


def _write(
    folder: Path,
    report: str,
    summary: dict[str, Any],
    records: Iterator[dict[str, Any]],
    rows: Sequence[Row],
    margin: np.ndarray,
    scores: Sequence[torch.Tensor],
) -> None:
    """Write the results as a folder, which appears only when complete."""
    with new_folder(folder) as new:
        names = figures(new, rows, margin, *(score.cpu().numpy() for score in scores))
        report += "".join(f"\n![{name}]({name})\n" for name in names)
        (new / "report.md").write_text(report)
        write_json(new / "summary.json", summary)
        with (new / "pairs.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
