"""final/: the trained model in Hugging Face's files, with its card, and whether it is sound."""

import os
import shutil

import torch
import torch.distributed as dist

from notus.build import Setup
from notus.engine import checkpoint, history
from notus.engine.best import Best
from notus.engine.log import warn
from notus.engine.saver import describe_model
from notus.errors import UserError, agreed
from notus.files import PARTIAL, new_folder, partial_path, set_aside, sync, write_json, writing
from notus.model.hub import copy_tokenizer
from notus.model.mistral import MistralForCausalLM
from notus.model.peft import (
    adapter_tensors,
    check_fits,
    read_adapter,
    save_adapter,
    write_merged,
)
from notus.model.weights import gather_own, open_model, save_tensors
from notus.run_folder import remove_leftovers


def holds_final(setup: Setup) -> bool:
    """Whether final/ holds the run's model; a damaged one is set aside, to be exported again.

    Collective. Raises UserError, on every rank, for a damaged one without a checkpoint.
    """
    final = setup.output / "final"
    sealed = (final / checkpoint.MANIFEST).is_file()  # not after a kill just before that
    found = [os.path.lexists(final), final_damage(setup), sealed]
    dist.broadcast_object_list(found, 0)  # a shared file system may show the ranks others
    there, damage, sealed = found
    if sealed and not damage:
        damage = checkpoint.damage(final)
    if not there or not damage:
        return there
    with agreed():
        if not setup.checkpoint:
            raise UserError(
                f"{final} is damaged ({damage}), and no checkpoint is there to export it from; "
                "restore it, or give it another name to train from the start"
            )
        if setup.ranks.first:
            with writing(final):
                aside = set_aside(final).name
            warn(f"{final} is damaged ({damage}): kept as {aside}, and exported again")
    return False


def final_damage(setup: Setup) -> str:
    """The damage of final/, by its files' sizes and headers; "" if nothing is."""
    final, lora, shape = setup.output / "final", setup.config.model.lora, setup.models.shape
    if final.is_symlink() or not final.is_dir():
        return "not a folder"
    try:
        if lora is not None:
            check_fits(read_adapter(final / "adapter"), shape)
        if (lora is None or lora.merge) and open_model(str(final))[1] != shape:
            return "its config.json is not this model's"
    except UserError as error:
        return str(error)
    return ""


def complete_final(setup: Setup) -> None:
    """Do what a kill prevented after the model was written: manifest, end of the history, card.

    Collective. Raises UserError, on every rank, when that cannot be written.
    """
    final = setup.output / "final"
    with agreed():
        if setup.ranks.first:
            history.record_end(setup.output, final.stat().st_mtime)
            remove_leftovers(setup.output)
            if not os.path.lexists(final / checkpoint.MANIFEST):
                checkpoint.seal(final)
    write_model_card(setup)


def write_model_card(setup: Setup) -> None:
    """Write final/README.md, unless it is there. Collective. Raises UserError, on every rank."""
    from notus.card.card import write_card

    with agreed():
        if setup.ranks.first and not (setup.output / "final/README.md").is_file():
            setup.ranks.say(f"wrote {write_card(setup.output)}")


def export(setup: Setup, policy: MistralForCausalLM, best: Best | None) -> None:
    """Write final/: the trained model, or its adapters and, if wanted, their sum with the base.

    The policy then has the weights of the best checkpoint, if it is to be exported from there.
    Collective. Raises UserError, on every rank, if that is damaged or nothing can be written.
    """
    final = setup.output / "final"
    folder = best.folder(setup.output / "checkpoints") if best else None
    if folder and setup.config.evaluation.export_best:
        if problem := checkpoint.damage(folder):
            raise UserError(
                f"{problem}: the best checkpoint is damaged, and final/ was not written; "
                "evaluation.export_best=false writes the last weights"
            )
        checkpoint.load_trained(folder, policy)
        setup.ranks.say(f"the best checkpoint is {folder.name}: {best.record}")
    if setup.config.model.lora is None:
        _export_model(setup, policy)
    else:
        _export_adapters(setup, policy)
    with agreed():
        if setup.ranks.first:
            checkpoint.seal(final)


def _export_model(setup: Setup, policy: MistralForCausalLM) -> None:
    """Write final/ as a bfloat16 Hugging Face folder, which appears only when it is complete."""
    folder, first = setup.output / "final", setup.ranks.first
    partial = partial_path(folder)
    tensors = ((name, p.detach().to(torch.bfloat16)) for name, p in policy.named_parameters())
    index, file, own = gather_own(tensors, checkpoint.MODEL)
    try:
        with agreed(), writing(folder):
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with agreed(), writing(folder):
            if own:
                save_tensors(partial / file, own)
        with agreed(), writing(folder):
            if first:
                write_json(checkpoint.index_file(partial, checkpoint.MODEL), index)
                describe_model(partial, torch.bfloat16, setup.models.source)
                for path in (*partial.iterdir(), partial):
                    sync(path)
                os.rename(partial, folder)
                sync(folder.parent)
    except UserError:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _export_adapters(setup: Setup, policy: MistralForCausalLM) -> None:
    """Write final/adapter in PEFT's format; with model.lora.merge, its sum with the base too."""
    final, base, lora = setup.output / "final", setup.models.source, setup.config.model.lora
    base_name = str(base) if base.parent == setup.output else setup.config.model.policy
    tensors = adapter_tensors(policy)
    with agreed():
        if setup.ranks.first:
            for left in setup.output.glob(f"{PARTIAL}*-{final.name}"):  # of a killed export
                shutil.rmtree(left, ignore_errors=True)
            with new_folder(final) as partial:
                save_adapter(partial / "adapter", tensors, lora, base_name)
                copy_tokenizer(base, partial / "adapter")
                if lora.merge:
                    write_merged(partial, base, partial / "adapter")
