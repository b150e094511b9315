"""Direct preference optimisation of a Mistral-architecture model.

    torchrun --nproc_per_node 8 train.py configs/notus.json [section.key=value ...]
    python train.py configs/demo.json                        # one process, the same path

`train` is the loop, the line that a pair of responses travels: pairs -> plan -> packed microbatch
-> response log-probs -> loss -> step. What the configuration names is opened by notus/opening.py.
README.md says where to change what.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from notus.agreement import agree
from notus.card.card import write_card
from notus.config import Config, load_config, to_dict
from notus.data.packing import slots_of
from notus.data.planning import random_seed
from notus.dryrun.memory import parameter_counts
from notus.dryrun.preflight import Question, preflight, shard_size
from notus.engine import checkpoint, distributed, history, resume
from notus.engine.checkpoint import Progress, Saver
from notus.engine.distributed import Ranks, accumulate
from notus.engine.evaluation import evaluate
from notus.engine.hardware import gpu_named
from notus.engine.lock import OutputLock
from notus.engine.metrics import (
    NONFINITE_FILE,
    MetricsLog,
    Speed,
    Totals,
    Verdict,
    Work,
    judge_step,
    nonfinite_pairs,
    pair_metrics,
)
from notus.engine.optim import schedule_factor
from notus.engine.profiling import profiled
from notus.engine.signals import Interrupts
from notus.errors import UserError
from notus.generate.result import show_result
from notus.generate.samples import record_samples
from notus.model.lora import export_adapter
from notus.objective.logprobs import couple_step, pack_plan, pair_log_probs, token_log_probs
from notus.objective.losses import PairLogProbs
from notus.objective.reference import follow
from notus.opening import (
    Run,
    answer_samples,
    check_loss,
    lora_settings,
    make_scorer,
    open_inputs,
    open_run,
    plan_run,
    sample_prompts,
)


def train(
    config: Config,
    ranks: Ranks,
    run: Run,
    saver: Saver,
    interrupts: Interrupts,
    step_done: Callable[[], None],
) -> bool:
    """The loop: from the pairs of each step to the weight update.

    step_done: called after each step, for a profiler. Returns whether all steps were done: False
    when a signal ended it, after a save.
    """
    policy, reference, loss, plan, pairs = run.policy, run.reference, run.loss, run.plan, run.pairs
    tokens = slots_of(pairs.lengths, prefix_sharing=False)  # as two sequences: 2P + C + R
    tokens_seen = sum(int(tokens[plan.pairs_of(done)].sum()) for done in range(run.progress.step))
    log = agree(
        lambda: MetricsLog(run.output, step=run.progress.step, total=plan.steps, active=ranks.first)
    )
    totals = Totals()
    totals.restore(run.progress.totals, ranks.device)
    skipped, stopped = run.progress.skipped, False
    if run.progress.step == 0:
        log.write(0, evaluate_held_out(config, ranks, run))
    online = loss.uses_reference and config.reference.log_probs == "online"
    work = Work(
        frozen=config.model.lora is not None,
        recomputed=config.parallel.activation_checkpointing == "full",
        scorings=online + loss.couples_pairs * (1 + online),
    )
    speed = Speed(policy.shape, ranks.count, ranks.device, work)

    for step in range(run.progress.step, plan.steps):
        chosen = plan.pairs_of(step)
        division = plan.division(chosen)
        mean_chosen_length = float(pairs.lengths[chosen, 1].mean())
        pair_losses = step_loss_function(config, ranks, run, chosen)
        policy.train()  # dropout in adapters; scoring turns it off
        torch.manual_seed(random_seed(config.train.seed, step, ranks.rank))
        step_loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        step_totals, seen = Totals(), []
        batches = pack_plan(division, pairs, config.data.prefix_sharing, ranks.device)
        for batch in accumulate(policy, batches, len(division.bins), config.parallel.keep_gathered):
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
            step_totals.add(pair_metrics(losses.detach(), scored, loss))
            seen.append((batch.pairs, losses.detach()))

        grad_norm = clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm)
        verdict = judge_step(step_loss, grad_norm.full_tensor(), len(chosen), *interrupts.take())
        totals.add_step(step_totals, verdict.finite)
        rate = config.optimizer.learning_rate * schedule_factor(
            step,
            total=plan.steps,
            name=config.schedule.name,
            warmup_ratio=config.schedule.warmup_ratio,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        done = step + 1
        if verdict.finite:
            run.optimizer.step()
            skipped = 0
        else:
            skipped += 1
            report_skipped(config, ranks, run, log, done, verdict, chosen, seen, skipped)
        run.optimizer.zero_grad()

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
                "grad_norm": verdict.grad_norm,
                "learning_rate": rate,
                "epoch": done / plan.steps_per_epoch,
                "num_tokens": tokens_seen,
            }
        # once in a while: evaluate
        if done == plan.steps or is_due(done, config.evaluation.every):
            metrics |= evaluate_held_out(config, ranks, run)
            show_samples(config, ranks, run, log, done)
            speed.restart()
        log.write(done, metrics)
        step_done()
        # once in a while, and when a signal asks for it: save, behind the next steps
        asked = verdict.save or verdict.stop
        if asked or done == plan.steps or is_due(done, config.checkpoint.every):
            progress = Progress(done, totals.snapshot(), skipped)
            saver.save(policy, run.optimizer, run.following, progress)
            speed.restart()
        if verdict.stop:
            stopped = True
            ranks.say(f"stopped by a signal after {done:,} steps; started again, it goes on")
            break
    log.close()
    return not stopped


def report_skipped(
    config: Config,
    ranks: Ranks,
    run: Run,
    log: MetricsLog,
    done: int,
    verdict: Verdict,
    chosen: np.ndarray,
    seen: list[tuple[Tensor, Tensor]],
    skipped: int,
) -> None:
    """Record which pairs made step `done` not finite: those with such a loss, or else all.

    Raises UserError after train.max_nonfinite such steps in a row, `skipped` counting this one.
    """
    pairs = nonfinite_pairs(seen) or sorted(chosen.tolist())
    path = run.output / NONFINITE_FILE
    values = {"loss": f"{verdict.loss:g}", "grad_norm": f"{verdict.grad_norm:g}"}
    what = " and ".join(f"{name} {value}" for name, value in values.items())
    if ranks.first:
        named = [{"index": index, "where": run.origins[index]} for index in pairs]
        log.nonfinite.add({"step": done, **values, "pairs": named})
    ranks.say(f"step {done:,}: {what}: no update; {len(pairs):,} pairs are named in {path}")
    if skipped >= config.train.max_nonfinite:
        raise UserError(
            f"step {done:,}: {what}, the last of {skipped} steps in a row without an update "
            f"(train.max_nonfinite); {path} names the pairs, the first is {run.origins[pairs[0]]}"
        )


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


def show_samples(config: Config, ranks: Ranks, run: Run, log: MetricsLog, done: int) -> None:
    """The policy's answers as it is now beside the reference's: samples.md and TensorBoard."""
    if config.evaluation.samples is None:
        return
    answers = answer_samples(config, ranks, run.policy, run.source)
    if ranks.first:
        prompts = sample_prompts(config)
        texts = run.reference_answers, answers
        log.show(lambda board: record_samples(run.output, board, done, prompts, *texts))


def dry_run(config: Config, ranks: Ranks, options: argparse.Namespace) -> int:
    """Check everything, report what the run would be; the exit code, 1 if it does not fit."""
    gpu = None if options.gpu is None else gpu_named(options.gpu)
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: expected at least 1")
    if options.price is not None and not 0 < options.price < math.inf:
        raise UserError(f"--price {options.price:g}: expected the price of one GPU for one hour")
    shard, replicate = config.parallel.shard, config.parallel.replicate
    gpus = options.gpus or max(ranks.count, (shard or 1) * replicate)
    shard_size(gpus, shard, replicate)
    inputs = open_inputs(config, ranks, weights=False, describe=True)
    output = Path(config.output_dir)
    settings = to_dict(config) | {"loss": inputs.loss.settings}
    agree(lambda: resume.check_output_dir(output, settings, options.resume))
    if not options.model_only:
        checkpoint.find_checkpoint(output / "checkpoints", options.resume, ranks.say)
    else:
        checkpoint.check_sound(Path(options.resume))
    counts = parameter_counts(inputs.shape, lora_settings(config))
    merged = inputs.adapter is not None and config.model.reference is not None
    same_model = inputs.reference_folder.resolve() == inputs.source.resolve() and not merged
    report, fits = preflight(
        Question(
            config=config,
            shape=inputs.shape,
            counts=counts,
            plan=plan_run(config, inputs.pairs, gpus),
            pairs=inputs.pairs,
            held_out=inputs.held_out,
            uses_reference=inputs.loss.uses_reference,
            reference_is_base=counts.frozen > 0 and same_model,
            couples_pairs=inputs.loss.couples_pairs,
        ),
        gpu,
        options.price,
    )
    ranks.say(report)
    return 0 if fits else 1


def run_to_end(config: Config, ranks: Ranks, run: Run, profile: int | None) -> bool:
    """Train, save and export; whether the run is finished, and not stopped by a signal.

    Raises UserError when its last checkpoint could not be saved.
    """
    saver = Saver(
        run.output / "checkpoints",
        keep=config.checkpoint.keep,
        source=run.source,
        facts=run.facts,
        previous=run.progress.step,
    )
    trace = profiled(run.output / "profile", profile, ranks.rank)
    with Interrupts() as interrupts, saver, trace as step_done:
        finished = train(config, ranks, run, saver, interrupts, step_done)
        unsaved = saver.wait()
    if finished:
        export(config, run)
        ranks.say(f"wrote {run.output / 'final'}")
    agree(lambda: history.record_end(run.output))
    if finished:
        agree(lambda: write_card(run.output) if ranks.first else None)
    if unsaved:
        raise UserError(f"the last checkpoint was not saved: {unsaved}")
    return finished


def export(config: Config, run: Run) -> None:
    """Write final/: the trained model, or its adapters and, if wanted, their sum with the base."""
    final, lora = run.output / "final", lora_settings(config)
    if lora is None:
        checkpoint.export(final, run.policy, run.source)
        return
    agree(
        lambda: export_adapter(
            final,
            run.policy,
            lora,
            base_name=config.model.policy if run.source.parent != run.output else str(run.source),
            base=run.source,
            merged=config.model.lora.merge,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Direct preference optimisation.")
    parser.add_argument("config", help="a JSON file, see configs/ and notus/config.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--gpus", type=int, help="dry run: for how many GPUs; default: as started")
    parser.add_argument("--gpu", metavar="NAME", help="dry run: which, such as a100-40gb")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="trace so many steps")
    parser.add_argument("--price", type=float, help="dry run: of one GPU for one hour")
    parser.add_argument(
        "--resume", default="auto", help="auto (the newest checkpoint), never, or a checkpoint"
    )
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="a new run, whose policy begins with the weights of the checkpoint --resume names",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.model_only and options.resume in ("auto", "never"):
        parser.error("--model-only needs --resume with the folder of a checkpoint")
    if options.profile is not None and options.profile < 1:
        parser.error(f"--profile: found {options.profile}, expected at least 1")
    planned = (options.gpus, options.gpu, options.price)
    if not options.dry_run and planned != (None, None, None):
        parser.error("--gpus, --gpu and --price need --dry-run")
    ranks = None
    try:
        config = load_config(options.config, options.overrides)
        check_loss(config, options)
        ranks = distributed.start("cpu" if options.dry_run else config.parallel.device)
        if options.dry_run:
            return dry_run(config, ranks, options)
        if config.parallel.device == "auto" and ranks.device.type == "cpu":
            ranks.say(f"no CUDA device was found (PyTorch {torch.__version__}): using the CPU")
        with OutputLock(Path(config.output_dir)) as lock:
            run = open_run(
                config,
                ranks,
                lock,
                resume=options.resume,
                model_only=options.model_only,
            )
            if run is not None and run_to_end(config, ranks, run, options.profile):
                source, output = run.source, run.output
                del run  # the models that now answer need the memory
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
