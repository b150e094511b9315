"""Trajectory parity with TRL's DPOTrainer: same weights, tokens, order, hyper-parameters; float32.

    pip install -e . && pip install -r benchmarks/requirements.txt
    python -m benchmarks.parity_trl --pairs PAIRS --tokenizer TOKENIZER [--loss NAME ...] [--lora]

PAIRS is a preference file that notus reads (rows of plain text become one user and one assistant
turn), or `demo` for what `python -m notus.demo` wrote. TOKENIZER is a Hugging Face folder or a
sentencepiece model. A small random Mistral (grouped-query attention, a window shorter than the
sequences) is trained by `train.py` and again by TRL, and what both log is compared at every
optimiser step. With --lora both train adapters of all linear layers, TRL those of PEFT, and the
reference is the model without them. With --evaluate PAIRS nothing is trained: TRL's evaluation of
a moved policy is compared with that of `eval.py preferences`. Exit code 1: something differed by
more than the tolerance.

What has to be matched before the two do the same arithmetic:

- Tokenizer. Where tokenizer_config.json names LlamaTokenizer, as Mistral's and Zephyr's do, TRL
  (through transformers 5) rebuilds the normaliser; notus takes tokenizer.json as it stands, and so
  does TRL here.
- Tokens. TRL keeps what a chat template writes after the last end-of-sequence token (Zephyr's: a
  newline); notus' "clean" tokenization ends at that token. Here TRL tokenizes and the tail is cut.
  Both differences are counted and printed; `num_tokens` must then be equal at every step.
- Truncation. TRL keeps each sequence's first max_length tokens: "sequence" in notus.
- Pairs. notus drops pairs whose responses are empty, or identical after truncation; TRL does not,
  and is given the rest. Both take them in file order.
- Embeddings. transformers gives the embedding of config.pad_token_id no gradient, even where that
  token is the end-of-sequence token, as Zephyr's is; notus trains every row. The model here names
  no padding token, as Mistral-7B and Zephyr's SFT model do not.
- Adapters (--lora). notus' start, which `train.seed` determines, is saved as a PEFT folder and read
  into TRL's model by PEFT. Without dropout: the two draw different numbers.
- Averages. TRL averages the means of its micro-batches, which is the mean over pairs when all are
  equally large, as here; notus packs by tokens and divides once. A loss that sorts a batch, or
  averages over its tokens, is that of the whole step in notus: TRL then gets one micro-batch.
- Label smoothing. TRL ignores it for "sigmoid". Its "aot_unpaired" is the same formula when a
  micro-batch holds one pair (a sort of one number), so TRL runs that; the loss it logs is checked
  against the formula written out in float64 over the margins it logs.

A difference is relative to the larger of the two values. A reward is beta times a difference of two
log-prob sums L, and float32 leaves beta * |L| * 2**-23 of it undetermined however it is computed:
a reward counts as no smaller than 1000 times that. Before the first step every reward is 0, TRL's
exactly, and which of two equal rewards is the larger (rewards/accuracies) is not compared.

For scale: TRL against itself, two pairs in a micro-batch instead of four, differs by up to 4e-4 in
the rewards of "sigmoid" within eight steps of UltraFeedback text. "discopop" may fail where a mean
reward crosses 0: its mixing coefficient changes 1 / 0.05 times as fast as a sigmoid loss, and there
TRL differs from itself by 1e-3.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file
from transformers import (
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from notus.config import Curation, Source
from notus.data.formats import Message
from notus.data.preferences import load_preferences
from notus.data.tokenizer import load_tokenizer, sentencepiece_backend
from notus.demo import CHAT_TEMPLATE
from notus.errors import UserError
from notus.files import write_json
from notus.model.hf_config import read_shape
from notus.model.lora import LoraSettings, add_adapters, initialize_adapters
from notus.model.mistral import MistralForCausalLM as OurMistral
from notus.model.peft import WEIGHTS, adapter_tensors, save_adapter
from notus.tables import text_table

REPOSITORY = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
MAX_LENGTH = 512
PAIRS_PER_STEP = 8
EVALUATED_AT_ONCE = 4
LEARNING_RATE = 1e-3  # log-ratios of several nats within ten steps
LORA = LoraSettings(rank=8, alpha=16, target_modules="all-linear")
LORA_LEARNING_RATE = 1e-2  # the same with adapters
SEED = 42
LOG_PROBS = ("logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
METRICS = (
    *("loss", "grad_norm", *REWARDS, *LOG_PROBS),
    *("rewards/accuracies", "learning_rate", "num_tokens"),
)
Log = list[dict[str, float]]  # one entry per optimiser step


class Case(NamedTuple):
    """One loss as both trainers spell it, and the metrics that mean the same in both."""

    notus: dict[str, Any]
    trl: dict[str, Any]
    pairs_per_microbatch: int = PAIRS_PER_STEP // 2  # TRL's
    metrics: tuple[str, ...] = METRICS


def same(name: str, pairs_per_microbatch: int = PAIRS_PER_STEP // 2, **options: float) -> Case:
    """A loss with the same name and options in both."""
    return Case({"name": name, **options}, {"loss_type": name, **options}, pairs_per_microbatch)


def variant(ours: dict[str, Any], theirs: dict[str, Any]) -> Case:
    """A loss that TRL spells as an option of "sigmoid"."""
    return Case(ours | {"beta": 0.1}, {"loss_type": "sigmoid", "beta": 0.1} | theirs)


REQUIRED = {
    "sigmoid": same("sigmoid", beta=0.1),
    "sigmoid-smoothed": Case(
        {"name": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
        {"loss_type": "aot_unpaired", "beta": 0.1, "label_smoothing": 0.1},
        pairs_per_microbatch=1,
    ),
    "ipo": same("ipo", beta=0.1),
    "sigmoid_norm": same("sigmoid_norm", beta=5.0),
}
PLAIN = ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
DIVERGENCES = {
    "forward_kl": "forward_kl",
    "jensen_shannon": "js_divergence",
    "alpha": "alpha_divergence",
}
MIX = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
CASES = {
    **REQUIRED,
    **{name: same(name, beta=0.1) for name in PLAIN},
    "robust": same("robust", beta=0.1, label_smoothing=0.1),
    "exo_pair": same("exo_pair", beta=0.1, label_smoothing=1e-3),
    "aot": same("aot", PAIRS_PER_STEP, beta=0.1),
    "aot_unpaired": same("aot_unpaired", PAIRS_PER_STEP, beta=0.1),
    **{
        f"f_dpo-{ours}": variant(
            {"name": "f_dpo", "divergence": ours}, {"f_divergence_type": theirs}
        )
        for ours, theirs in DIVERGENCES.items()
    },
    "wpo": variant({"name": "wpo"}, {"use_weighting": True}),
    "ld_dpo": variant({"name": "ld_dpo", "alpha": 0.5}, {"ld_alpha": 0.5})._replace(
        metrics=("loss", "grad_norm", "num_tokens")  # TRL logs its discounted log-probs
    ),
    "mix": Case(
        {"mix": [{"name": name, "weight": weight} for name, weight in MIX.items()]},
        {"loss_type": list(MIX), "loss_weights": list(MIX.values()), "beta": 0.1},
        pairs_per_microbatch=PAIRS_PER_STEP,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trajectory parity with TRL's DPOTrainer.")
    parser.add_argument("--pairs", required=True, help="a preference file, or: demo")
    parser.add_argument("--tokenizer", default="demo/sft", help="folder or sentencepiece model")
    parser.add_argument(
        "--loss", nargs="+", choices=["all", *CASES], default=list(REQUIRED), metavar="NAME",
        help=f"all, or any of {', '.join(CASES)} (default: {' '.join(REQUIRED)})",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps")
    parser.add_argument("--ranks", type=int, default=1, help="processes of train.py")
    parser.add_argument("--lora", action="store_true", help="train adapters; needs peft")
    parser.add_argument(
        "--evaluate", type=int, metavar="PAIRS", help="compare an evaluation of so many pairs only"
    )
    parser.add_argument("--json", type=Path, help="write every value here")
    options = parser.parse_args(arguments)

    disable_progress_bars()
    disable_progress_bar()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "policy", Path(options.tokenizer))
        if options.evaluate:
            return evaluate(work, options.pairs, options.evaluate)
        if options.lora:
            write_adapter(work)
        write_pairs(work, options.pairs, options.steps * PAIRS_PER_STEP)
        for name in CASES if "all" in options.loss else options.loss:
            theirs = train_with_trl(CASES[name], work, options.steps, options.lora)
            ours = train_with_notus(CASES[name], work, options.steps, options.ranks, options.lora)
            results[name] = compare(CASES[name], ours, theirs)
            print_table(name, results[name])

    if options.json is not None:
        write_json(options.json, results)
    worst = max(row["relative"] for rows in results.values() for row in rows)
    print(f"\nworst relative difference: {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


# ------------------------------------------------------------------------------- what is trained


def write_model(folder: Path, tokenizer_path: Path) -> None:
    """A random Mistral of two layers, with the tokenizer, as a Hugging Face folder."""
    if tokenizer_path.is_dir():
        tokenizer = load_tokenizer(tokenizer_path)
    elif tokenizer_path.is_file():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=sentencepiece_backend(tokenizer_path), bos_token="<s>",
            eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        )  # fmt: skip
    else:
        raise UserError(f"--tokenizer {tokenizer_path}: no such folder or file")
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=MAX_LENGTH // 4,
        initializer_range=0.1,  # logits of standard deviation 0.8: predictions that differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    MistralForCausalLM(config).to(torch.float32).save_pretrained(folder)


def write_adapter(work: Path) -> None:
    """The adapters that train.py begins with, as PEFT's folder work/adapter."""
    with torch.device("meta"):
        model = OurMistral(read_shape(work / "policy"))
    add_adapters(model, LORA)
    model.to_empty(device="cpu")
    initialize_adapters(model, SEED)
    save_adapter(work / "adapter", adapter_tensors(model), LORA, str(work / "policy"))


def write_pairs(work: Path, path: str, count: int) -> None:
    """work/pairs.jsonl, read by both trainers: the first `count` pairs that neither drops.

    Prints how many of them TRL's own tokenization would have made other tokens of.
    """
    demo = path == "demo"
    curation = Curation(rule="mean-rating") if demo else None
    source = Source(path="demo/preferences.jsonl" if demo else path, curation=curation)
    ours = load_tokenizer(work / "policy")
    rebuilt = LlamaTokenizer.from_pretrained(work / "policy")
    rows = []
    rebuilt_differently = tails = cut = 0
    for pair in load_preferences([source], seed=0).train:
        row = {
            "prompt": as_messages(pair.prompt, "user"),
            "chosen": as_messages(pair.chosen, "assistant"),
            "rejected": as_messages(pair.rejected, "assistant"),
        }
        prompt, *responses = trl_tokens(row, ours)
        trimmed = [without_tail(ids, ours.eos_token_id) for ids in responses]
        room = MAX_LENGTH - len(prompt)
        if room <= 0 or trimmed[0][:room] == trimmed[1][:room]:
            continue
        rows.append(row)
        rebuilt_differently += trl_tokens(row, rebuilt) != (prompt, *responses)
        tails += trimmed != responses
        cut += max(map(len, trimmed)) > room
        if len(rows) == count:
            break
    else:
        raise UserError(f"--pairs {path}: {len(rows)} usable pairs, expected at least {count}")
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(
        f"{count} pairs, {cut} of them cut at {MAX_LENGTH} tokens. TRL left alone: tokens after "
        f"the last {ours.eos_token} in {tails} of them, other tokens under a tokenizer_config.json "
        f"that names LlamaTokenizer in {rebuilt_differently}"
    )


def as_messages(content: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def trl_tokens(
    row: dict[str, list[Message]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected tokens as DPOTrainer makes them of a conversation."""
    render = partial(tokenizer.apply_chat_template, return_dict=False)
    prompt = render(row["prompt"], add_generation_prompt=True)
    chosen, rejected = (render(row["prompt"] + row[side]) for side in ("chosen", "rejected"))
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def without_tail(ids: list[int], eos: int) -> list[int]:
    """`ids` up to the last `eos`."""
    return ids[: len(ids) - ids[::-1].index(eos)]


# ---------------------------------------------------------------------------------- the two runs


class TrimmedDPOTrainer(DPOTrainer):
    """TRL's trainer, with responses that end at their end-of-sequence token.

    `pair_margins` holds the logged rewards/margins of every micro-batch, one list per step.
    """

    def __init__(self, **arguments: Any) -> None:
        self.pair_margins: list[list[float]] = []
        super().__init__(**arguments)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, *others: Any
    ) -> Dataset:
        eos = processing_class.eos_token_id
        return (
            super()
            ._prepare_dataset(dataset, processing_class, *others)
            .map(
                lambda row: {
                    key: without_tail(row[key], eos) for key in ("chosen_ids", "rejected_ids")
                }
            )
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not at the end, when TRL logs the run's duration
            self.pair_margins.append(self._metrics["train"]["rewards/margins"])
        super().log(logs, start_time)


def train_with_trl(case: Case, work: Path, steps: int, lora: bool) -> Log:
    """What TRL logs at each step, in full precision."""
    peft_config = None
    if lora:
        from peft import PeftConfig, set_peft_model_state_dict

        peft_config = PeftConfig.from_pretrained(work / "adapter")
        peft_config.inference_mode = False  # saved adapters are frozen
    settings = DPOConfig(
        output_dir=str(work / "trl"),
        max_length=MAX_LENGTH,
        max_steps=steps,
        per_device_train_batch_size=case.pairs_per_microbatch,
        gradient_accumulation_steps=PAIRS_PER_STEP // case.pairs_per_microbatch,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=LORA_LEARNING_RATE if lora else LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **case.trl,
    )
    rows = [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]
    trainer = TrimmedDPOTrainer(
        model=str(work / "policy"),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(work / "policy"),
        peft_config=peft_config,
    )
    if lora:
        set_peft_model_state_dict(trainer.model, load_file(work / "adapter" / WEIGHTS))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if case.pairs_per_microbatch == 1:
        smoothing = case.trl["label_smoothing"]
        for entry, margins in zip(log, trainer.pair_margins, strict=True):
            written_out = sum(smoothed_loss(margin, smoothing) for margin in margins) / len(margins)
            assert math.isclose(entry["loss"], written_out, rel_tol=1e-5), (entry, written_out)
    return log


def smoothed_loss(margin: float, smoothing: float) -> float:
    """-(1 - e) log s(m) - e log s(-m), m being beta times the margin (ericmitchell.ai/cdpo.pdf)."""
    return (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(
        math.exp(margin)
    )


def train_with_notus(case: Case, work: Path, steps: int, ranks: int, lora: bool) -> Log:
    """What train.py writes to metrics.jsonl."""
    output = work / "notus"
    shutil.rmtree(output, ignore_errors=True)  # the case before this one
    config = {
        "model": {"policy": str(work / "policy"), "compute_dtype": "float32"},
        "data": {
            "train": [{"path": str(work / "pairs.jsonl")}],
            "max_length": MAX_LENGTH,
            "truncation": "sequence",
            "shuffle": False,
            "tokens_per_microbatch": 4 * MAX_LENGTH,
        },
        "loss": case.notus,
        "optimizer": {
            "name": "adamw",
            "learning_rate": LORA_LEARNING_RATE if lora else LEARNING_RATE,
            "max_grad_norm": 1.0,
        },
        "schedule": {"name": "linear", "warmup_ratio": 0.0},
        "train": {"pairs_per_step": PAIRS_PER_STEP, "max_steps": steps, "seed": SEED},
        "output_dir": str(output),
    }
    if lora:
        config["model"]["lora"] = {
            "rank": LORA.rank,
            "alpha": LORA.alpha,
            "target_modules": LORA.target_modules,
        }
    (work / "config.json").write_text(json.dumps(config))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(REPOSITORY / "train.py"), str(work / "config.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise UserError(f"{' '.join(command)} exited with {run.returncode}:\n{run.stderr}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


# --------------------------------------------------------------------------------- an evaluation


def evaluate(work: Path, path: str, count: int) -> int:
    """TRL's evaluation beside `eval.py preferences`: the same pairs, policy and reference.

    TRL reports the mean of its batches' means, so the pairs are a whole number of batches.
    """
    write_pairs(work, path, count)
    tokenizer = load_tokenizer(work / "policy")
    lines = (work / "pairs.jsonl").read_text().splitlines(keepends=True)
    whole = [line for line in lines if longest_sequence(json.loads(line), tokenizer) <= MAX_LENGTH]
    whole = whole[: len(whole) // EVALUATED_AT_ONCE * EVALUATED_AT_ONCE]
    if not whole:
        raise UserError(f"--evaluate {count}: fewer than {EVALUATED_AT_ONCE} pairs need no cut")
    (work / "pairs.jsonl").write_text("".join(whole))
    trained = MistralForCausalLM.from_pretrained(work / "policy")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(work / "trained")
    tokenizer.save_pretrained(work / "trained")
    rows = [json.loads(line) for line in whole]
    settings = DPOConfig(
        output_dir=str(work / "trl"),
        max_length=MAX_LENGTH,
        per_device_eval_batch_size=EVALUATED_AT_ONCE,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        disable_tqdm=True,
    )
    trainer = TrimmedDPOTrainer(
        model=str(work / "trained"),
        ref_model=MistralForCausalLM.from_pretrained(work / "policy"),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()
    words = ["preferences", str(work / "trained"), "--reference", str(work / "policy")]
    words += ["--data", str(work / "pairs.jsonl"), "--max-length", str(MAX_LENGTH)]
    words += ["--compute-dtype", "float32", "--device", "cpu", "--out", str(work / "evaluation")]
    subprocess.run(
        [sys.executable, str(REPOSITORY / "eval.py"), *words],
        check=True,
        capture_output=True,
    )
    ours = json.loads((work / "evaluation" / "summary.json").read_text())["metrics"]
    print(f"{len(rows)} pairs, none of them cut\n{'':20}{'TRL':>14}{'notus':>14}{'relative':>10}")
    worst = 0.0
    for name in (key for key in METRICS if key in ours):
        relative = abs(ours[name] - theirs[f"eval_{name}"]) / max(abs(theirs[f"eval_{name}"]), 1e-8)
        print(f"{name:20}{theirs[f'eval_{name}']:>14.6f}{ours[name]:>14.6f}{relative:>10.1e}")
        worst = max(worst, relative)
    return int(worst > TOLERANCE)


def longest_sequence(row: dict[str, list[Message]], tokenizer: PreTrainedTokenizerBase) -> int:
    prompt, *responses = trl_tokens(row, tokenizer)
    return len(prompt) + max(map(len, responses))


def compare(case: Case, ours: Log, theirs: Log) -> list[dict[str, Any]]:
    """One row per step and metric: both values and their relative difference."""
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    beta = case.trl["beta"]
    rows = []
    for our, their in zip(ours, theirs, strict=True):
        resolution = beta * max(abs(their[name]) for name in LOG_PROBS) * 2**-23
        for name in case.metrics:
            if name == "rewards/accuracies" and all(their[reward] == 0 for reward in REWARDS):
                continue
            scale = max(abs(our[name]), abs(their[name]), sys.float_info.min)
            if name in REWARDS:
                scale = max(scale, resolution / TOLERANCE)
            rows.append(
                {
                    "step": our["step"],
                    "metric": name,
                    "notus": our[name],
                    "trl": their[name],
                    "relative": abs(our[name] - their[name]) / scale,
                }
            )
    return rows


def print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Every step of every metric, then each metric's worst step."""
    worst = {}
    for row in rows:
        worst[row["metric"]] = max(worst.get(row["metric"], row), row, key=itemgetter("relative"))
    for title, some in ((name, rows), ("worst", worst.values())):
        text = [[f"{v:.8g}" if isinstance(v, float) else v for v in row.values()] for row in some]
        print(f"\n{title}\n{text_table(list(rows[0]), text)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
