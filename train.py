"""Direct preference optimisation of a Mistral-architecture model.

    torchrun --nproc_per_node 8 train.py configs/notus.json [section.key=value ...]
    python train.py configs/demo.json                        # one process, the same path

`train` is the loop, the path of a pair of responses: pairs -> plan -> packed microbatch -> response
log-probs -> loss -> step. notus/build.py builds what the configuration names, notus/start.py opens
and ends a run. README.md says where to change what.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Rows differ in length from step to step: with segments of fixed sizes, memory that was freed soon
# is left in pieces too small for other rows. PyTorch reads this when it first allocates on a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from notus.build import answer_samples, check_loss, sample_prompts, set_learning_rate
from notus.config import load_config
from notus.console import quiet_libraries, report_error
from notus.data.packing import pack_division
from notus.data.planning import random_seed
from notus.engine import distributed
from notus.engine.distributed import accumulate
from notus.engine.lock import OutputLock
from notus.engine.log import NONFINITE_FILE, MetricsLog
from notus.engine.metrics import Meter, Verdict, all_log_probs, evaluate, nonfinite_pairs
from notus.engine.pair_records import record_pairs
from notus.engine.profiling import profiled
from notus.engine.saver import Saver
from notus.engine.signals import Interrupts
from notus.errors import UserError
from notus.generate.result import show_result
from notus.generate.samples import record_samples
from notus.objective.logprobs import pair_log_probs, score, token_log_probs
from notus.objective.loss import Coupled, couple
from notus.objective.reference import follow
from notus.start import Run, finish, open_log, open_meter, open_run, open_saver


def train(run: Run, saver: Saver, interrupts: Interrupts, profiler: Callable[[], None]) -> bool:
    """The loop: from a step's pairs to the weight update. False if a signal ended it early."""
    config, ranks, policy, reference = run.config, run.ranks, run.policy, run.reference
    loss, plan, meter, log = run.loss, run.plan, open_meter(run), open_log(run)
    stopped = False
    if run.progress.step == 0:
        log.write(0, evaluate_held_out(run, 0))
        meter.restart_clock()

    for step in range(run.progress.step, plan.steps):
        chosen = plan.pairs_of(step)  # the step's pairs, the same on any number of ranks
        division = plan.division(chosen)  # their places on ranks and in microbatches
        coupled = couple_pairs(run, chosen) if loss.couples_pairs else None
        mean_length = float(run.pairs.lengths[chosen, 1].mean())
        policy.train()  # dropout in adapters; scoring turns it off
        torch.manual_seed(random_seed(config.train.seed, step, ranks.rank))

        batches = pack_division(division, run.pairs, ranks.rank, run.rows)
        for batch in accumulate(policy, batches, len(division.bins), run.keep_gathered):
            policy_S = token_log_probs(policy, batch, loss.uses_weights)
            reference_S = reference.of_batch(batch)
            scored = pair_log_probs(policy_S, reference_S, batch.lengths, mean_length)
            losses = coupled(scored, batch.pairs) if coupled else loss(scored)  # [B]
            # The step's gradient is the mean over its pairs, whatever the packing and the number
            # of ranks: FSDP sums over ranks and never divides, so this is the only division.
            (losses.sum() / len(chosen)).backward()
            meter.add(batch, losses, scored)

        norm = clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm).full_tensor()
        verdict = meter.end_step(norm, chosen, division, interrupts.take())
        rate = set_learning_rate(config, plan, run.optimizer, step)
        done, last = step + 1, step + 1 == plan.steps
        if verdict.finite:
            run.optimizer.step()
        else:
            report_skipped(run, log, meter, done, verdict, chosen)
        run.optimizer.zero_grad()

        # once in a while: let the reference follow (TR-DPO)
        if is_due(done, config.reference.sync_every):
            follow(run.following, policy, config.reference.sync_share)
        metrics: dict[str, float] = {}
        # once in a while: log
        if last or is_due(done, config.log.every):
            own = {"grad_norm": verdict.grad_norm, "learning_rate": rate}
            metrics |= meter.report() | own | {"epoch": done / plan.steps_per_epoch}
        # once in a while: evaluate
        if last or is_due(done, config.evaluation.every):
            metrics |= evaluate_held_out(run, done)
            show_samples(run, log, done)
            meter.restart_clock()
        log.write(done, metrics)
        profiler()
        # once in a while, and when a signal asks for it: save, in the background
        if last or verdict.save or verdict.stop or is_due(done, config.checkpoint.every):
            saver.save(policy, run.optimizer, run.following, meter.progress(done))
            meter.restart_clock()
        if stopped := verdict.stop:
            ranks.say(f"stopped by a signal after {done:,} steps; the same command resumes the run")
            break
    log.close()
    return not stopped


def couple_pairs(run: Run, chosen: np.ndarray) -> Coupled:
    """A loss that couples the step's pairs, made additive by a pass without gradient."""
    policy = score(run.policy, run.pairs, chosen, run.rows, run.loss.uses_weights)
    reference = run.reference.of_pairs(chosen)
    scored = all_log_probs(policy, reference, run.pairs.select(chosen))
    return couple(run.loss, scored, torch.from_numpy(chosen).to(policy.device))


def report_skipped(
    run: Run, log: MetricsLog, meter: Meter, done: int, verdict: Verdict, chosen: np.ndarray
) -> None:
    """Record the pairs that made step `done` non-finite: those with such a loss, or else all.

    Collective. Raises UserError after train.max_nonfinite such steps in a row.
    """
    pairs = nonfinite_pairs(meter.last_seen) or sorted(chosen.tolist())
    path = run.output / NONFINITE_FILE
    values = {"loss": f"{verdict.loss:g}", "grad_norm": f"{verdict.grad_norm:g}"}
    what = " and ".join(f"{name} {value}" for name, value in values.items())
    if run.ranks.first:
        named = [{"index": index, "where": run.origins[index]} for index in pairs]
        log.nonfinite.add({"step": done, **values, "pairs": named})
    run.ranks.say(f"step {done:,}: {what}: no update; {path} names {len(pairs):,} pairs")
    if meter.skipped >= run.config.train.max_nonfinite:
        raise UserError(
            f"step {done:,}: {what}, the last of {meter.skipped} steps in a row without an update "
            f"(train.max_nonfinite); {path} names the pairs, the first is {run.origins[pairs[0]]}"
        )


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after `step` steps; None: never."""
    return every is not None and step % every == 0


def evaluate_held_out(run: Run, done: int) -> dict[str, float]:
    """The eval_ metrics of the policy after `done` steps; empty without held-out pairs."""
    if run.held_out is None:
        return {}
    pairs = range(len(run.held_out))
    policy = score(run.policy, run.held_out, pairs, run.rows, run.loss.uses_weights)
    reference = run.held_out_reference.of_pairs(pairs)
    scored = all_log_probs(policy, reference, run.held_out)
    record_pairs(run.output, run.held_out_about, scored, run.loss)
    metrics = evaluate(policy, reference, run.held_out, run.loss, run.held_out_sets)
    if run.best:
        run.best.note(done, metrics)
    return metrics


def show_samples(run: Run, log: MetricsLog, done: int) -> None:
    """Show the policy's current answers next to the reference's: samples.md and sinks."""
    if run.config.evaluation.samples is None:
        return
    answers = answer_samples(run, run.policy)
    if run.ranks.first:
        prompts = sample_prompts(run.config)
        texts = run.reference_answers, answers
        log.samples(done, [*zip((prompt.text for prompt in prompts), *texts, strict=True)])
        log.show(lambda board: record_samples(run.output, board, done, prompts, *texts))


def run_to_end(run: Run, profile: int | None) -> bool:
    """Train, save and export. False if a signal ended the run early.

    Raises UserError when the last checkpoint could not be saved.
    """
    saver = open_saver(run)
    with saver, profiled(run.output / "profile", profile, run.ranks.rank) as profiler:
        finished = train(run, saver, run.interrupts, profiler)
        unsaved = saver.wait()
    finish(run, finished, unsaved)
    return finished


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options; exits with code 2 for options that contradict each other."""
    parser = argparse.ArgumentParser(description="Direct preference optimisation.")
    parser.add_argument("config", help="a JSON file, see configs/ and notus/config.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--gpus", type=int, help="dry run: for how many GPUs; default: as started")
    parser.add_argument("--gpu", metavar="NAME", help="dry run: which, such as a100-40gb")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="trace so many steps")
    parser.add_argument("--price", type=float, help="dry run: of one GPU for one hour")
    about = "auto (the newest checkpoint), never, or a checkpoint"
    parser.add_argument("--resume", default="auto", help=about)
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="a new run whose policy starts from the weights of the checkpoint --resume names",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.model_only and options.resume in ("auto", "never"):
        parser.error("--model-only needs --resume with the folder of a checkpoint")
    if options.profile is not None and options.profile < 1:
        parser.error(f"--profile: found {options.profile}, expected at least 1")
    planned = (options.gpus, options.gpu, options.price)
    if not options.dry_run and planned != (None, None, None):
        parser.error("--gpus, --gpu and --price need --dry-run")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    options, ranks = parse(arguments), None
    quiet_libraries()
    with Interrupts() as interrupts:
        try:
            config = load_config(options.config, options.overrides)
            check_loss(config, options)
            ranks = distributed.start("cpu" if options.dry_run else config.parallel.device)
            if options.dry_run:
                from notus.dryrun.preflight import dry_run

                interrupts.restore()
                return dry_run(config, ranks, options)
            if config.parallel.device == "auto" and ranks.device.type == "cpu":
                ranks.say(f"no CUDA device was found (PyTorch {torch.__version__}): using the CPU")
            with OutputLock(Path(config.output_dir)) as lock:
                run = open_run(config, ranks, lock, interrupts, options)
                if run is not None and run_to_end(run, options.profile):
                    source, output = run.models.source, run.output
                    del run  # its models need the memory that the answering ones take
                    show_result(config, ranks, source, output)
        except UserError as error:
            # Before the ranks have met, the first process of each machine prints it.
            first = ranks.first if ranks else os.environ.get("LOCAL_RANK", "0") == "0"
            report_error(error, prints=first)
            return 2
        finally:
            distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
