"""Direct preference optimisation of a Mistral-architecture model.

    torchrun --nproc_per_node 8 train.py configs/notus.json [section.key=value ...]
    python train.py configs/demo.json                        # one process, the same path

`train` is the loop, the line that a pair of responses travels: pairs -> plan -> packed microbatch
-> response log-probs -> loss -> step. `open_run`, below it, opens what the configuration names.
README.md says where to change what.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from notus.config import Config, Holdout, load_config, to_dict
from notus.data.packing import slots_of
from notus.data.planning import RunPlan
from notus.data.preferences import Pair, load_preferences
from notus.data.tokenization import Tokenized, TokenizedPairs, load_tokenizer, tokenize_pairs
from notus.engine import checkpoint, distributed
from notus.engine.distributed import Ranks, agree, divide
from notus.engine.evaluation import evaluate
from notus.engine.metrics import MetricsLog, Speed, Totals, pair_metrics, require_finite
from notus.engine.optim import make_optimizer, schedule_factor
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM, ModelShape, read_shape
from notus.model.weights import load_weights, open_model, weights_identity
from notus.objective.logprobs import (
    Scorer,
    couple_step,
    pack_plan,
    pair_log_probs,
    scorer,
    token_log_probs,
)
from notus.objective.losses import Loss, PairLogProbs, build_loss
from notus.objective.reference import (
    Reference,
    cache_identity,
    cached_log_probs,
    cached_reference,
    check_start,
    follow,
    no_reference,
    online_reference,
)
from notus.report.samples import check_prompts, show_result


class Run(NamedTuple):
    """All that a run consists of, opened and ready to go on from `step`."""

    output: Path
    source: Path  # the folder of the initial policy
    loss: Loss
    plan: RunPlan
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    policy: MistralForCausalLM
    reference: Reference
    held_out_reference: Reference | None
    following: MistralForCausalLM | None  # the reference model, if it follows the policy
    optimizer: Optimizer
    step: int  # optimiser steps done
    totals: dict[str, list[float]]  # of metrics, since they were last reported
    common: dict[str, Any]  # what a continuation must have in common


def train(config: Config, ranks: Ranks, run: Run) -> None:
    """The loop: from the pairs of each step to the weight update."""
    policy, reference, loss, plan, pairs = run.policy, run.reference, run.loss, run.plan, run.pairs
    tokens = pairs.lengths.sum(1) + pairs.lengths[:, 0]  # as two sequences: 2P + C + R
    tokens_seen = sum(int(tokens[plan.pairs_of(done)].sum()) for done in range(run.step))
    log = MetricsLog(run.output, step=run.step, total=plan.steps, active=ranks.first)
    totals, speed = Totals(), Speed(policy.shape, ranks.count, ranks.device)
    totals.restore(run.totals, ranks.device)
    if run.step == 0:
        log.write(0, evaluate_held_out(config, ranks, run))

    for step in range(run.step, plan.steps):
        chosen = plan.pairs_of(step)
        division = plan.division(chosen)
        mean_chosen_length = float(pairs.lengths[chosen, 1].mean())
        pair_losses = step_loss_function(config, ranks, run, chosen)
        step_loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for batch in pack_plan(division, pairs, config.data.prefix_sharing, ranks.device):
            reference_log_probs = reference.of_batch(batch)
            log_probs = token_log_probs(policy, batch, loss.uses_weights)
            scored = pair_log_probs(
                log_probs, reference_log_probs, batch.lengths, mean_chosen_length
            )
            losses = pair_losses(scored, batch.pairs)
            # The step's gradient is the mean over its pairs, whatever the packing and the number
            # of ranks: FSDP sums over ranks and never divides, so this is the only division.
            (losses.sum() / len(chosen)).backward()
            step_loss += losses.detach().sum()
            totals.add(pair_metrics(losses.detach(), scored, loss.beta, loss.uses_reference))

        grad_norm = clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm)
        grad_norm = require_finite(grad_norm.full_tensor(), step_loss, step, chosen)
        rate = config.optimizer.learning_rate * schedule_factor(
            step,
            total=plan.steps,
            name=config.schedule.name,
            warmup_ratio=config.schedule.warmup_ratio,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        run.optimizer.zero_grad()

        done = step + 1
        # once in a while: let the reference follow (TR-DPO)
        if is_due(done, config.reference.sync_every):
            follow(run.following, policy, config.reference.sync_share)
        tokens_seen += int(tokens[chosen].sum())
        speed.count(pairs.lengths[chosen], int(plan.slot_counts[chosen].sum()), division)
        metrics: dict[str, float] = {}

        # once in a while: log
        if done == plan.steps or is_due(done, config.log.every):
            metrics |= totals.means() | speed.report()
            metrics |= {
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "epoch": done / plan.steps_per_epoch,
                "num_tokens": tokens_seen,
            }
        # once in a while: evaluate
        if done == plan.steps or is_due(done, config.evaluation.every):
            metrics |= evaluate_held_out(config, ranks, run)
            speed.restart()
        log.write(done, metrics)
        # once in a while: save
        if done == plan.steps or is_due(done, config.checkpoint.every):
            checkpoint.save_checkpoint(
                run.output / "checkpoints",
                done,
                policy,
                run.optimizer,
                run.following,
                common=run.common,
                totals=totals.snapshot(),
                source=run.source,
                keep=config.checkpoint.keep,
            )
            speed.restart()
    log.close()


def step_loss_function(
    config: Config, ranks: Ranks, run: Run, chosen: np.ndarray
) -> Callable[[PairLogProbs, Tensor], Tensor]:
    """From a microbatch's log-probs and pair indices to its losses [B], within one step.

    Most losses look at one pair at a time. One that sorts the step's pairs needs them all first,
    in a pass without gradient.
    """
    if not run.loss.couples_pairs:
        return lambda scored, indices: run.loss(scored)
    score_pairs = make_scorer(config, run.policy, run.pairs, ranks, run.loss.uses_weights)
    policy, reference = score_pairs(chosen), run.reference.of_pairs(chosen)
    return couple_step(run.loss, policy, reference, run.pairs, chosen)


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after `step` steps; None: never."""
    return every is not None and step % every == 0


def evaluate_held_out(config: Config, ranks: Ranks, run: Run) -> dict[str, float]:
    """The eval_ metrics of the policy as it is now; none without held-out pairs."""
    if run.held_out is None:
        return {}
    score_pairs = make_scorer(config, run.policy, run.held_out, ranks, run.loss.uses_weights)
    reference = run.held_out_reference.of_pairs(range(len(run.held_out)))
    return evaluate(score_pairs, run.held_out, reference, run.loss)


def open_run(config: Config, ranks: Ranks, *, resume: str, dry_run: bool) -> Run | None:
    """Check and open everything; None if there is nothing to train.

    Raises UserError, alike on all ranks, for what the user can get wrong. Nothing is written before
    data, models and output_dir have been found usable.
    """
    loss = build_loss(config.loss.section)
    check_settings(config, loss)
    mesh = distributed.make_mesh(ranks, config.parallel.shard, config.parallel.replicate)
    source, shape = agree(lambda: open_model(config.model.policy))
    reference_path, reference_folder = config.model.policy, source
    if config.model.reference:
        reference_path = config.model.reference
        reference_folder, other = agree(lambda: open_model(reference_path))
        if other.vocab_size != shape.vocab_size:
            raise UserError(
                f"model.reference: {reference_path} has a vocabulary of {other.vocab_size} tokens, "
                f"the policy one of {shape.vocab_size}; expected the same"
            )
    if config.evaluation.samples is not None:
        agree(lambda: check_prompts(config.evaluation.samples.prompts, source))
    pairs, held_out = read_data(config, source, shape, ranks)
    plan = plan_run(config, pairs, ranks)
    output = Path(config.output_dir)
    settings = to_dict(config) | {"loss": loss.settings}
    agree(lambda: checkpoint.check_output_dir(output, settings, resume))
    found = agree(lambda: checkpoint.find_checkpoint(output / "checkpoints", resume))
    ranks.say(
        f"{plan.steps:,} steps of {plan.pairs_per_step} pairs, {plan.steps_per_epoch:,} per epoch; "
        f"{shape.num_parameters:,} parameters on {ranks.count} x {ranks.device.type}",
    )
    if (output / "final").exists():
        ranks.say(f"{output / 'final'} holds the model of this run: nothing left to do")
        return None
    if dry_run:
        return None
    distributed.check_host_memory(shape.num_parameters, ranks)

    identity = weights_identity(reference_path, reference_folder) if loss.uses_reference else None
    common = checkpoint.common_ground(settings, shape, pairs, identity, plan.steps)
    if found:
        agree(lambda: checkpoint.check_checkpoint(found, common))
    policy = build_model(config, shape, mesh, ranks, frozen=False)
    agree(lambda: load_weights(policy, source))
    agree(lambda: checkpoint.write_settings(output, settings))
    agree(lambda: checkpoint.check_shared(output))
    sets = [pairs] if held_out is None else [pairs, held_out]
    references, following = [no_reference(data, ranks.device) for data in sets], None
    if loss.uses_reference:
        ranks.say(f"reference log-probs: {config.reference.log_probs}")
        references, model = open_reference(
            config, policy, source, reference_folder, identity, mesh, ranks, sets
        )
        following = model if config.reference.sync_every else None
    optimizer = build_optimizer(config, policy)
    step, totals = 0, {}
    if found:
        step, totals = agree(
            lambda: checkpoint.load_checkpoint(found, policy, optimizer, following)
        )
        ranks.say(f"resumed from {found} after {step:,} steps")
    elif loss.uses_reference and reference_folder.resolve() == source.resolve():
        check_first_batch(config, ranks, loss, plan, pairs, policy, references[0])
    return Run(
        output=output,
        source=source,
        loss=loss,
        plan=plan,
        pairs=pairs,
        held_out=held_out,
        policy=policy,
        reference=references[0],
        held_out_reference=references[1] if held_out is not None else None,
        following=following,
        optimizer=optimizer,
        step=step,
        totals=totals,
        common=common,
    )


def check_loss(config: Config, options: argparse.Namespace) -> None:
    """Check the section that only the losses know, naming where it was written."""
    try:
        build_loss(config.loss.section)
    except UserError as error:
        overrides = [word for word in options.overrides if word.startswith("loss")]
        origin = f"command line, {' '.join(overrides)}" if overrides else options.config
        raise UserError(f"{origin}: {error}") from None


def check_settings(config: Config, loss: Loss) -> None:
    """What can only be said once the loss is known."""
    if loss.uses_reference and config.reference.log_probs == "none":
        raise UserError(
            f'reference.log_probs: found "none", but the loss {loss.name} compares the policy with '
            'a reference; expected "cached" or "online"'
        )
    if not loss.uses_reference and config.model.reference is not None:
        raise UserError(f"model.reference: does nothing, because {loss.name} uses no reference")
    if not loss.uses_reference and config.reference.log_probs == "online":
        raise UserError(
            f'reference.log_probs: "online" does nothing, because {loss.name} uses no reference; '
            "leave it out"
        )


def read_data(
    config: Config, source: Path, shape: ModelShape, ranks: Ranks
) -> tuple[TokenizedPairs, TokenizedPairs | None]:
    """The training pairs and the held-out ones (None without evaluation), as tokens.

    The ranks tokenize a share each; all of them get all pairs.
    """
    tokenizer = agree(lambda: load_tokenizer(source))
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is "
            f"{shape.vocab_size}; expected at least as many"
        )
    holdout = config.data.eval.holdout if isinstance(config.data.eval, Holdout) else 0
    seed = config.train.seed
    found = agree(lambda: load_preferences(config.data.train, seed=seed, holdout=holdout))
    sets, dropped = {"train": found.train}, {"train": found.dropped}
    if holdout:
        sets["eval"] = found.holdout
    elif config.data.eval is not None:
        other = agree(lambda: load_preferences(config.data.eval, seed=seed))
        sets["eval"], dropped["eval"] = other.train, other.dropped

    def tokenize(share: list[Pair]) -> Tokenized:
        return tokenize_pairs(
            share,
            tokenizer,
            style=config.data.tokenization,
            truncation=config.data.truncation,
            max_length=config.data.max_length,
            max_prompt_length=config.data.max_prompt_length,
            system_prompt=config.data.system_prompt,
        )

    tokenized = {}
    for name, pairs in sets.items():
        result = Tokenized.join(divide(pairs, tokenize))
        earlier = dropped.get(name, {})  # a holdout's are counted with the training data's
        counts = {f"dropped: {reason}": n for reason, n in earlier.items()} | result.counts
        notes = "".join(f"; {n:,} {reason}" for reason, n in counts.items())
        ranks.say(f"{name} data: {len(result.pairs):,} pairs{notes}")
        if not len(result.pairs):
            raise UserError(f"data.{name}: no pair is left after tokenization{notes}")
        slots = slots_of(result.pairs.lengths, config.data.prefix_sharing)
        if slots.max() > config.data.tokens_per_microbatch:
            longest = pairs[result.kept[slots.argmax()]]
            raise UserError(
                f"{longest.where}: the pair takes {slots.max()} tokens, but "
                f"data.tokens_per_microbatch is {config.data.tokens_per_microbatch}; raise it, or "
                "lower data.max_length"
            )
        tokenized[name] = result.pairs
    return tokenized["train"], tokenized.get("eval")


def build_model(
    config: Config, shape: ModelShape, mesh: DeviceMesh, ranks: Ranks, *, frozen: bool
) -> MistralForCausalLM:
    """A sharded model without weights: float32 if they will change, else compute_dtype."""
    compute_dtype = getattr(torch, config.model.compute_dtype)
    constant = frozen and config.reference.sync_every is None
    with torch.device("meta"):
        model = MistralForCausalLM(shape).to(compute_dtype if constant else torch.float32)
    model.requires_grad_(not frozen)
    distributed.shard_model(
        model,
        mesh,
        ranks.device,
        compute_dtype=compute_dtype,
        activation_checkpointing="none" if frozen else config.parallel.activation_checkpointing,
        compile_blocks=compiles(config, ranks),
        cpu_offload=config.parallel.cpu_offload,
    )
    return model


def open_reference(
    config: Config,
    policy: MistralForCausalLM,
    source: Path,
    folder: Path,
    identity: dict[str, str],
    mesh: DeviceMesh,
    ranks: Ranks,
    sets: list[TokenizedPairs],
) -> tuple[list[Reference], MistralForCausalLM]:
    """The reference, whose weights lie in `folder`, over each of `sets`, and the model itself.

    `policy` must hold its initial weights, those of `source`: they are the reference when that is
    the same folder. What a checkpoint restored never is.
    """
    model = policy
    online = config.reference.log_probs == "online"
    if online or folder.resolve() != source.resolve():
        model = build_model(config, agree(lambda: read_shape(folder)), mesh, ranks, frozen=True)
        agree(lambda: load_weights(model, folder))
    references = []
    compute_dtype = getattr(torch, config.model.compute_dtype)
    for pairs in sets:
        score_pairs = make_scorer(config, model, pairs, ranks)
        if online:
            references.append(online_reference(model, score_pairs))
        else:
            flat = cached_log_probs(
                Path(config.output_dir) / "reference",
                pairs,
                cache_identity(pairs, identity, model.shape, compute_dtype),
                score_pairs,
                ranks.device,
            )
            references.append(cached_reference(flat, pairs))
    return references, model


def check_first_batch(
    config: Config,
    ranks: Ranks,
    loss: Loss,
    plan: RunPlan,
    pairs: TokenizedPairs,
    policy: MistralForCausalLM,
    reference: Reference,
) -> None:
    """Refuse to start when policy and reference, the same weights, disagree on the first batch."""
    division = plan.division(plan.pairs_of(0))
    batch = next(iter(pack_plan(division, pairs, config.data.prefix_sharing, ranks.device)))
    with torch.no_grad():
        log_probs = token_log_probs(policy, batch, loss.uses_weights)
    scored = pair_log_probs(log_probs, reference.of_batch(batch), batch.lengths, 1.0)
    agree(lambda: check_start(loss, scored, getattr(torch, config.model.compute_dtype)))


def make_scorer(
    config: Config,
    model: MistralForCausalLM,
    pairs: TokenizedPairs,
    ranks: Ranks,
    sum_squares: bool = False,
) -> Scorer:
    """Scores pairs of a data set under `model`, without gradient, the work shared by all ranks."""
    return scorer(
        model,
        pairs,
        budget=config.data.tokens_per_microbatch,
        prefix_sharing=config.data.prefix_sharing,
        device=ranks.device,
        sum_squares=sum_squares,
    )


def plan_run(config: Config, pairs: TokenizedPairs, ranks: Ranks) -> RunPlan:
    """Which pairs every step trains on, and how they are divided."""
    return RunPlan(
        slots_of(pairs.lengths, config.data.prefix_sharing),
        pairs_per_step=config.train.pairs_per_step,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        ranks=ranks.count,
        budget=config.data.tokens_per_microbatch,
    )


def build_optimizer(config: Config, policy: MistralForCausalLM) -> Optimizer:
    """The configured optimiser over the policy's sharded float32 parameters."""
    return make_optimizer(
        policy.parameters(),
        name=config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        betas=config.optimizer.betas,
        alpha=config.optimizer.alpha,
        eps=config.optimizer.eps,
    )


def compiles(config: Config, ranks: Ranks) -> bool:
    """Whether transformer blocks are compiled."""
    wanted = config.parallel.compile
    return ranks.device.type == "cuda" if wanted == "auto" else wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Direct preference optimisation.")
    parser.add_argument("config", help="a JSON file, see configs/ and notus/config.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument(
        "--resume", default="auto", help="auto (the newest checkpoint), never, or a checkpoint"
    )
    options = parser.parse_intermixed_args(arguments)
    ranks = None
    try:
        config = load_config(options.config, options.overrides)
        check_loss(config, options)
        ranks = distributed.start(config.parallel.device)
        if config.parallel.device == "auto" and ranks.device.type == "cpu":
            ranks.say(f"no CUDA device was found (PyTorch {torch.__version__}): using the CPU")
        run = open_run(config, ranks, resume=options.resume, dry_run=options.dry_run)
        if run is not None:
            train(config, ranks, run)
            checkpoint.export(run.output / "final", run.policy, run.source)
            ranks.say(f"wrote {run.output / 'final'}")
            source, output = run.source, run.output
            del run  # the models that now answer need the memory
            gc.collect()
            show_result(config, ranks, source, output)
    except UserError as error:
        # Before the ranks have met, the first process of each machine speaks.
        if ranks.first if ranks else os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
