"""Saving checkpoints in the background, during training.

A save: every rank copies the complete tensors that it will write to the host; the next step then
starts, while one thread per rank writes, syncs and hashes. Rank 0 writes the manifest, renames the
folder, in which everything is then on disk, and removes old ones. A killed save leaves
`.partial-step-*`, which the next one removes. At most one save runs at a time.

When a save fails (no space, no permission), rank 0 reports it once, what it wrote is removed, older
checkpoints stay, and training continues. A run whose last save failed ends with an error, after its
final model has been written.

torch.distributed.checkpoint's HuggingFaceStorageWriter writes slices, which one rank must write
again before transformers can load the folder, and leaves everything else here to its caller.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from notus.engine.best import Best
from notus.engine.checkpoint import (
    MANIFEST,
    MODEL,
    STATE,
    Progress,
    checkpoint_name,
    checkpoints,
    entry,
    index_file,
    render_manifest,
    trained_parameters,
    weights_prefix,
)
from notus.engine.distributed import TIMEOUT
from notus.engine.host_memory import free_host_bytes
from notus.engine.log import warn
from notus.errors import UserError, agreed
from notus.files import Plain, partial_path, remove, sync, write_json, write_whole, writing
from notus.model.hf_config import decoder_config
from notus.model.host_copies import copy_bytes
from notus.model.hub import copy_tokenizer
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import gather_own, save_tensors


class Saver(AbstractContextManager):
    """Saves checkpoints under `root` in the background; the end of the context waits for the last.

    keep: how many complete ones stay. source: the folder whose config.json and tokenizer describe
    the model. facts: further entries of state.json; `resume.check_checkpoint` reads "common" and
    "settings". previous: the step from which the run resumes. best: which checkpoint stays in
    addition to those.
    host_bytes: room for the copies of this rank's tensors on the host; where they are larger, the
    step waits until each file is written before the next is copied. None: half of the free memory,
    divided by the ranks of this machine. All ranks must make the same calls.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        source: Path,
        facts: Mapping[str, object],
        previous: int = 0,
        best: Best | None = None,
        host_bytes: int | None = None,
    ) -> None:
        self.root, self.keep, self.source, self.facts = root, keep, source, facts
        self.previous, self.best, self.host_bytes = previous, best, host_bytes
        # The threads' collectives must not mix with those of the steps.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._outcome: Future[str | None] | None = None
        if previous and dist.get_rank() == 0:  # after a kill just before that was done
            self._remove(set(checkpoints(root, previous)[:-keep]) - {self._best_folder()})

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # A UserError is raised on every rank. After any other exception ranks may be gone: no wait.
        orderly = error is None or isinstance(error, UserError)
        self._thread.shutdown(wait=orderly, cancel_futures=not orderly)
        if orderly:
            dist.destroy_process_group(self._group)

    def save(
        self,
        model: MistralForCausalLM,
        optimizer: Optimizer,
        reference: MistralForCausalLM | None,
        progress: Progress,
    ) -> None:
        """Write root/step-<step>; returns once the tensors have been copied to the host.

        reference: the reference model if it changes during training.
        """
        self.wait()
        folder = self.root / checkpoint_name(progress.step)
        # Fewer than steps if some were skipped. Each parameter's state has the same number.
        updates = next((int(state["step"]) for state in optimizer.state.values()), 0)
        state = {**progress._asdict(), "updates": updates, **self.facts}
        if self.best:
            state["best"] = self.best.after(progress.step)
        groups = {
            weights_prefix(model): trained_parameters(model),
            "optimizer": _optimizer_tensors(model, optimizer),
        }
        if reference is not None:
            groups["reference"] = list(reference.named_parameters())
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room = free_host_bytes() // 2 // here if self.host_bytes is None else self.host_bytes
        stored = [tensor for tensors in groups.values() for _, tensor in tensors]
        size = sum(map(copy_bytes, stored)) // dist.get_world_size()
        if any(t.is_cuda for t in stored):  # PyTorch keeps what this save pins, for the next ones
            self.host_bytes = room
        ready = self._thread.submit(self._prepare, partial_path(folder))
        indexes: dict[str, Plain] = {}
        jobs: list[Future[Plain]] = []
        for prefix, tensors in groups.items():
            if jobs and size > room:
                jobs[-1].exception()  # only waits: `_publish` handles the error
            indexes[prefix], file, own = gather_own(tensors, prefix)
            path = partial_path(folder) / file
            jobs.append(self._thread.submit(_write_tensors, path, own, ready))
            del own  # the job's, which frees the tensors
        self._outcome = self._thread.submit(self._publish, folder, jobs, indexes, state)

    def wait(self) -> str | None:
        """Wait for the last save; None if it succeeded or there is none, else why it failed."""
        return self._outcome.result() if self._outcome else None

    # The methods below run in the thread, on all ranks, and return or raise the same on each.

    def _prepare(self, partial: Path) -> None:
        """Make the folder to write into, and remove what killed saves have left."""
        with agreed(self._group), writing(partial):
            if dist.get_rank() == 0:
                for left in self.root.glob(partial_path(Path("*")).name):
                    remove(left)
                partial.mkdir(parents=True)
                sync(self.root.parent)

    def _publish(
        self,
        folder: Path,
        jobs: Sequence[Future[Plain]],
        indexes: Mapping[str, Plain],
        state: Plain,
    ) -> str | None:
        """Name the folder when every rank has written its files; returns why that failed."""
        first, partial = dist.get_rank() == 0, partial_path(folder)
        try:
            with agreed(self._group):
                own = [entry for job in jobs for entry in job.result().items()]
            parts = [own] * dist.get_world_size()
            dist.all_gather_object(parts, own, group=self._group)
            with agreed(self._group), writing(partial):
                if first:
                    for prefix, index in indexes.items():
                        write_json(index_file(partial, prefix), index)
                    if MODEL in indexes:
                        describe_model(partial, torch.float32, self.source)
                    write_json(partial / STATE, state)
                    self._finish(folder, dict(entry for part in parts for entry in part))
        except UserError as error:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                kept = checkpoints(self.root, upto=self.previous)
                older = f"{kept[-1]} is kept" if kept else "there is no older one"
                warn(f"{folder} was not saved: {error}; {older}, and training continues")
            return str(error)
        if self.best:
            self.best.record = state["best"]
        if first:
            old = superseded(self.root, folder, previous=self.previous, keep=self.keep)
            self._remove(old - {self._best_folder()})
        self.previous = state["step"]
        return None

    def _best_folder(self) -> Path | None:
        return self.best.folder(self.root) if self.best else None

    def _remove(self, old: set[Path]) -> None:
        try:
            for path in old:
                remove(path)
        except OSError as error:
            warn(f"an old checkpoint was not removed: {error}")

    def _finish(self, folder: Path, files: Plain) -> None:
        """Write the manifest and rename the folder; files: the manifest's entries of all ranks."""
        partial = partial_path(folder)
        others = [path for path in sorted(partial.iterdir()) if path.name not in files]
        files |= {path.name: _to_disk(path) for path in others}
        write_whole(partial / MANIFEST, render_manifest(files), durable=True)
        remove(folder)  # a damaged one, which was passed over
        os.rename(partial, folder)
        sync(self.root)


def superseded(root: Path, newest: Path, *, previous: int, keep: int) -> set[Path]:
    """All checkpoints but `newest`, which was just written, and the keep - 1 before it.

    previous: the step of the save before, or the one from which the run resumed. Checkpoints of
    later steps, which the run passed over, are among them.
    """
    before = [path for path in checkpoints(root, previous) if path != newest]
    kept = {newest, *before[max(0, len(before) - (keep - 1)) :]}
    return set(checkpoints(root)) - kept


def _optimizer_tensors(model: MistralForCausalLM, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """State tensors by "<state>/<parameter>"; none before the first update."""
    tensors = []
    for name, parameter in trained_parameters(model):
        state = optimizer.state.get(parameter, {})
        assert state or not optimizer.state, f"{name}: no state; is it the sharded parameter?"
        tensors += [(f"{key}/{name}", state[key]) for key in sorted(state) if key != "step"]
    return tensors


def _write_tensors(path: Path, tensors: dict[str, Tensor], ready: Future[None]) -> Plain:
    """Write one safetensors file to disk and free its tensors; returns its manifest entry by name.

    ready: done when the folder exists; its error is raised here.
    """
    try:
        ready.result()
        with writing(path.parent):
            if tensors:  # a rank may have none, and no file
                save_tensors(path, tensors)
            return {path.name: _to_disk(path)} if tensors else {}
    finally:
        tensors.clear()


def _to_disk(path: Path) -> Plain:
    """The file's entry in the manifest, once its contents are on disk."""
    sync(path)
    return entry(path)


def describe_model(folder: Path, dtype: torch.dtype, source: Path) -> None:
    """Add what makes weights a Hugging Face folder: the configuration and the tokenizer."""
    config = decoder_config(source)
    config.pop("torch_dtype", None)  # the key's name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    copy_tokenizer(source, folder)
