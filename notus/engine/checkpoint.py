"""Complete checkpoints in sharded safetensors, written behind the training steps, and the export.

    checkpoints/step-00000500/
        model-0000r-of-0000W.safetensors      float32 masters; the folder loads with transformers
        model.safetensors.index.json, config.json, tokenizer files
        optimizer-0000r-of-0000W.safetensors  state tensors, named "<state>/<parameter>"
        optimizer.safetensors.index.json
        reference-*                           the reference, if it follows the policy (TR-DPO)
        state.json                            where the run stood, and what a resumed one must share
        manifest.json                         size and SHA-256 of every file, written last

Only parameters that are trained are stored. Beside a frozen base they are no model, and nothing may
take the folder for one: it then has adapter-*.safetensors with their own index, and neither
config.json nor tokenizer. No random state is stored: what is random is drawn anew from the seed and
the step.

A save. Every rank copies the whole tensors that it will write to the host; the next step then
begins, while one thread per rank writes, syncs and hashes. Rank 0 writes the manifest, renames the
folder and removes old ones. A folder has its final name only once everything in it is on disk, so
every folder named step-* is complete unless it was damaged later; a killed save leaves
`.partial-step-*`, which the next one removes. At most one save is under way.

When a save fails (no space, no permission), rank 0 says so once, with path and reason; what it
wrote is removed, older checkpoints stay, and training goes on. A run whose last save failed ends
with an error, after its final model has been written.

A resumed run takes the newest checkpoint whose files are what the manifest says, and names those
that it passed over. All ranks need the same output_dir: a shared file system.

torch.distributed.checkpoint's HuggingFaceStorageWriter was weighed. It writes the slices of sharded
tensors and needs a consolidation pass on one rank, reading and writing all of them again, before
transformers can load a folder; and it leaves optimiser state, hashes, the atomic name and retention
to its caller, which is most of what is here.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from notus.agreement import agree
from notus.engine.distributed import TIMEOUT
from notus.engine.host_memory import free_host_bytes
from notus.engine.log import warn
from notus.engine.metrics import Progress
from notus.engine.resume import differences, write_json
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import copy_tokenizer, gather_own, local_rows

MANIFEST = "manifest.json"
# How the files begin that hold what is trained: all of a model, or what is beside a frozen base.
MODEL, ADAPTER = "model", "adapter"

Plain = dict[str, Any]
Item = TypeVar("Item")


class Written(NamedTuple):
    """Files of one rank by name, {"bytes", "sha256"} each; or why they could not be written."""

    files: Plain
    problem: str | None


class Saver:
    """Saves checkpoints under `root` behind the steps; the context's end waits for the last.

    keep: complete ones that stay. source: the folder whose config.json and tokenizer describe the
    model. facts: further entries of state.json; "common" is what a run that resumes must share.
    previous: the step from which the run goes on.
    host_bytes: copies of tensors that may wait on the host to be written; where this rank's next
    file would exceed it, the step waits (one file may always wait). None: half of the host memory
    that is free, divided over the ranks of this machine. All ranks must make the same calls.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        source: Path,
        facts: Mapping[str, Any],
        previous: int = 0,
        host_bytes: int | None = None,
    ) -> None:
        self.root, self.keep, self.source, self.facts = root, keep, source, facts
        self.previous, self.host_bytes = previous, host_bytes
        # The threads' collectives must not mix with those of the steps.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._outcome: Future[str | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # All ranks meet a UserError alike. After anything else others may be gone: do not wait.
        alike = error is None or isinstance(error, UserError)
        self._thread.shutdown(wait=alike, cancel_futures=not alike)
        if alike:
            dist.destroy_process_group(self._group)

    def save(
        self,
        model: MistralForCausalLM,
        optimizer: Optimizer,
        reference: MistralForCausalLM | None,
        progress: Progress,
    ) -> None:
        """Write root/step-<step>; returns once the tensors have been copied to the host.

        reference: one that changes during training.
        """
        self.wait()
        folder = self.root / _name(progress.step)
        partial = self.root / f".partial-{folder.name}"
        state = {**progress._asdict(), "updates": _updates(optimizer), **self.facts}
        weights = _weights_prefix(model)
        groups = {weights: _trained(model), "optimizer": _optimizer_tensors(model, optimizer)}
        if reference is not None:
            groups["reference"] = list(reference.named_parameters())
        host_bytes = _spare_host_bytes() if self.host_bytes is None else self.host_bytes
        ready = self._thread.submit(self._prepare, partial)
        indexes: dict[str, Plain] = {}
        jobs: list[Future[Written]] = []
        waiting: list[tuple[Future[Written], int]] = []
        for prefix, tensors in groups.items():
            size = _largest_share([tensor for _, tensor in tensors])
            while waiting and size + sum(held for _, held in waiting) > host_bytes:
                waiting.pop(0)[0].exception()  # only waits: an error is met where it is collected
            indexes[prefix], file, own = gather_own(tensors, prefix)
            jobs.append(self._thread.submit(_write_tensors, partial / file, own, ready))
            waiting.append((jobs[-1], size))
            del own  # the job's, which frees the tensors
        self._outcome = self._thread.submit(self._publish, partial, folder, jobs, indexes, state)

    def wait(self) -> str | None:
        """Wait for the last save; None if there is none that failed, else why, on every rank."""
        return self._outcome.result() if self._outcome else None

    # What follows runs in the thread, on all ranks.

    def _prepare(self, partial: Path) -> str | None:
        """Make the folder to write into, and remove what killed saves have left; or why not."""

        def clear() -> None:
            for left in self.root.glob(".partial-*"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            _sync(self.root.parent)

        return self._any(_problem(clear) if dist.get_rank() == 0 else None)

    def _publish(
        self,
        partial: Path,
        folder: Path,
        jobs: Sequence[Future[Written]],
        indexes: Mapping[str, Plain],
        state: Plain,
    ) -> str | None:
        """Once all ranks have written their files: describe them, name the folder, remove old ones.

        Returns why that failed, on every rank.
        """
        first = dist.get_rank() == 0
        own = [job.result() for job in jobs]

        def describe() -> None:
            for prefix, index in indexes.items():
                write_json(_index_file(partial, prefix), index)
            if MODEL in indexes:
                _describe_model(partial, torch.float32, self.source)
            write_json(partial / "state.json", state)

        def finish() -> None:
            files = {name: about for part in parts for name, about in part.files.items()}
            others = [path for path in sorted(partial.iterdir()) if path.name not in files]
            files |= {path.name: _to_disk(path) for path in others}
            (partial / MANIFEST).write_text(_render_manifest(files))
            _sync(partial / MANIFEST)
            _sync(partial)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, which was passed over
            os.rename(partial, folder)
            _sync(self.root)

        parts = [part for parts in self._exchange(own) for part in parts]
        problem = next((part.problem for part in parts if part.problem is not None), None)
        if first and problem is None:
            problem = _problem(describe) or _problem(finish)
        problem = self._any(problem)
        if first and problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            kept = checkpoints(self.root, upto=self.previous)
            older = f"{kept[-1]} is kept" if kept else "there is no older one"
            warn(f"{folder} was not saved: {problem}; {older}, and training goes on")
        elif first:
            previous, self.previous = self.previous, state["step"]
            problem_with_old = _problem(
                lambda: retain(self.root, folder, previous=previous, keep=self.keep)
            )
            if problem_with_old is not None:
                warn(f"an old checkpoint was not removed: {problem_with_old}")
        return problem

    def _any(self, problem: str | None) -> str | None:
        return next((found for found in self._exchange(problem) if found is not None), None)

    def _exchange(self, value: Item) -> list[Item]:
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def retain(root: Path, newest: Path, *, previous: int, keep: int) -> None:
    """Remove all but `newest`, which was just written, and the keep - 1 before it.

    previous: the step at which the run saved before, or from which it went on. Checkpoints of later
    steps go as well: the run passed them over, as damaged or by an explicit --resume.
    """
    before = [path for path in checkpoints(root, previous) if path != newest]
    kept = {newest, *before[max(0, len(before) - (keep - 1)) :]}
    for path in checkpoints(root):
        if path not in kept:
            shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def export(folder: Path, model: MistralForCausalLM, source: Path) -> None:
    """Write the finished model as a bfloat16 Hugging Face folder; it has its name once whole.

    Collective. Raises UserError, alike on all ranks, when it cannot be written.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    first = dist.get_rank() == 0

    def clear() -> None:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def describe() -> None:
        if first:
            write_json(_index_file(partial, MODEL), index)
            _describe_model(partial, torch.bfloat16, source)
            for path in (*partial.iterdir(), partial):
                _sync(path)
            os.rename(partial, folder)
            _sync(folder.parent)

    def attempt(action: Callable[[], Any]) -> None:
        problem = _problem(action)
        if problem is not None:
            raise UserError(f"{folder} was not written: {problem}")

    try:
        agree(lambda: attempt(clear))
        tensors = ((name, p.detach().to(torch.bfloat16)) for name, p in model.named_parameters())
        index, file, own = gather_own(tensors, MODEL)
        agree(lambda: attempt(lambda: _save_file(partial / file, own) if own else None))
        agree(lambda: attempt(describe))
    except UserError:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoints(root: Path, upto: int = 99_999_999) -> list[Path]:
    """The complete checkpoints under `root`, oldest first, of steps up to `upto`."""
    found = root.glob("step-" + "[0-9]" * 8)  # no copies under other names, which are the user's
    return sorted(path for path in found if path.name <= _name(upto))


def find_checkpoint(root: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that --resume names: "auto" (the newest sound one), "never", or a path.

    say: told about each damaged one that was passed over. Collective. Raises UserError, alike on
    all ranks, when a path is no sound checkpoint, or when there are some and all are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        check_sound(Path(resume))
        return Path(resume)
    # One listing for all: a shared file system may show the ranks different ones.
    listed = [checkpoints(root)]
    dist.broadcast_object_list(listed, 0)
    problem = None
    for folder in reversed(listed[0]):
        problem = _damage(folder)
        if problem is None:
            return folder
        say(f"passed over the damaged checkpoint {folder.name}: {problem}")
    if problem is not None:
        raise UserError(
            f"{problem}; no sound checkpoint is left in {root}: restore one, or remove them to "
            "begin anew"
        )
    return None


def check_sound(folder: Path) -> None:
    """Raise UserError, alike on all ranks, when `folder` is not an undamaged checkpoint.

    Collective: the ranks read different files.
    """
    if not (folder / "state.json").is_file() and not (folder / MANIFEST).is_file():
        raise UserError(
            f"--resume {folder}: no {MANIFEST} there; expected auto, never, or the folder of a "
            "complete checkpoint, such as checkpoints/step-00000500 in an output_dir"
        )
    problem = _damage(folder)
    if problem is not None:
        raise UserError(f"--resume {folder}: the checkpoint is damaged: {problem}")


def check_checkpoint(folder: Path, common: Mapping[str, Any]) -> None:
    """Raise UserError when the checkpoint was made by a run that differs in `common`."""
    state = json.loads((folder / "state.json").read_text())
    different = differences(state["common"], dict(common))
    if different:
        raise UserError(
            f"{folder}: made by another run ({different}); resume with the settings it was made "
            "with, or begin a new run in another output_dir"
        )


def load_checkpoint(
    folder: Path,
    model: MistralForCausalLM,
    optimizer: Optimizer,
    reference: MistralForCausalLM | None,
) -> Progress:
    """Restore what `Saver.save` was given, each rank its own slices, on any number of ranks.

    The folder must be sound, and `check_checkpoint` have passed it.
    """
    state = json.loads((folder / "state.json").read_text())
    _load_tensors(folder, _weights_prefix(model), dict(_trained(model)))
    if reference is not None:
        _load_tensors(folder, "reference", dict(reference.named_parameters()))
    _load_optimizer(folder, model, optimizer, state["updates"])
    return Progress(state["step"], state["totals"], state["skipped"])


def load_trained(folder: Path, model: MistralForCausalLM) -> None:
    """Fill the parameters that are trained from a checkpoint of another run, each rank its slices.

    Raises UserError when these are not the tensors that it holds.
    """
    prefix = next((p for p in (MODEL, ADAPTER) if _index_file(folder, p).is_file()), None)
    if prefix is None:
        raise UserError(f"{folder}: no longer there; the run was to begin with its weights")
    index = _read_index(folder, prefix)
    tensors = dict(_trained(model))
    odd = sorted(index["weight_map"].keys() ^ tensors.keys())
    if odd:
        found = "holds" if odd[0] in index["weight_map"] else "lacks"
        raise UserError(f"{folder}: {found} {odd[0]}; expected the tensors that this run trains")
    for name, tensor in tensors.items():
        with safe_open(folder / index["weight_map"][name], framework="pt") as handle:
            shape = tuple(handle.get_slice(name).get_shape())
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: tensor {name} has shape {shape}, expected {tuple(tensor.shape)}"
            )
    _load_tensors(folder, prefix, tensors)


def weights_identity(folder: Path) -> dict[str, str]:
    """What the weights of a sound checkpoint are: {"path", "sha256"}, by its manifest."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    hashes = {
        name: about["sha256"]
        for name, about in files.items()
        if name.startswith((f"{MODEL}-", f"{ADAPTER}-"))
    }
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return {"path": str(folder.resolve()), "sha256": digest}


def _weights_prefix(model: MistralForCausalLM) -> str:
    return MODEL if all(p.requires_grad for p in model.parameters()) else ADAPTER


def _index_file(folder: Path, prefix: str) -> Path:
    return folder / f"{prefix}.safetensors.index.json"


def _read_index(folder: Path, prefix: str) -> Plain:
    return json.loads(_index_file(folder, prefix).read_text())


def _trained(model: MistralForCausalLM) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_tensors(model: MistralForCausalLM, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """State tensors by "<state>/<parameter>"; none before the first update."""
    tensors = []
    for name, parameter in _trained(model):
        state = optimizer.state.get(parameter, {})
        assert state or not optimizer.state, f"{name}: no state; is it the sharded parameter?"
        # "step" is equal for all: state.json holds it as "updates".
        tensors += [(f"{key}/{name}", state[key]) for key in sorted(state) if key != "step"]
    return tensors


def _updates(optimizer: Optimizer) -> int:
    """How often the optimiser has been applied: fewer times than steps if some were skipped."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


@torch.no_grad()
def _load_tensors(folder: Path, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill plain or sharded tensors, each rank its own rows."""
    index = _read_index(folder, prefix)
    for name, tensor in tensors.items():
        local, rows = local_rows(tensor)
        with safe_open(folder / index["weight_map"][name], framework="pt") as handle:
            local.copy_(handle.get_slice(name)[rows])


def _load_optimizer(
    folder: Path, model: MistralForCausalLM, optimizer: Optimizer, updates: int
) -> None:
    if updates == 0:
        return
    index = _read_index(folder, "optimizer")
    # Fused optimisers keep the step on the device, the others on the host.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for _, parameter in _trained(model):
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter]["step"] = torch.tensor(float(updates), device=device)
    tensors = {}
    for tensor_name in index["weight_map"]:
        key, name = tensor_name.split("/", 1)
        parameter = model.get_parameter(name)
        with safe_open(folder / index["weight_map"][tensor_name], framework="pt") as handle:
            dtype = handle.get_slice(tensor_name)[:0].dtype
        tensors[tensor_name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        optimizer.state[parameter][key] = tensors[tensor_name]
    _load_tensors(folder, "optimizer", tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor], ready: Future[str | None]) -> Written:
    """One safetensors file, on disk when this returns, and its tensors freed.

    ready: why there is no folder to write into, if there is none.
    """
    written: Plain = {}

    def write() -> None:
        if tensors:
            _save_file(path, tensors)
            written[path.name] = _to_disk(path)

    problem = ready.result() or _problem(write)
    tensors.clear()
    return Written(written, problem)


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of an OSError, without the path
        raise OSError(0, str(error), str(path)) from None


def _describe_model(folder: Path, dtype: torch.dtype, source: Path) -> None:
    """What makes weights a Hugging Face folder: the configuration and the tokenizer."""
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the key's name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    copy_tokenizer(source, folder)


def _render_manifest(files: Plain) -> str:
    """The manifest's text, which holds a checksum of itself."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2) + "\n"


def _damage(folder: Path) -> str | None:
    """What differs from the manifest, alike on all ranks; None if nothing does. Collective."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _own_damage(folder))
    return next((problem for problem in found if problem is not None), None)


def _own_damage(folder: Path) -> str | None:
    """The first damage among this rank's share of the files."""
    try:
        text = (folder / MANIFEST).read_text()
        files = json.loads(text)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST}: missing or not valid JSON"
    if text != _render_manifest(files):
        return f"{folder / MANIFEST}: its contents are not those that were written"
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        path, expected = folder / name, files[name]
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            seen = "nothing" if size is None else f"{size} bytes"
            return f"{path}: found {seen}, expected {expected['bytes']} bytes"
        try:
            digest = _sha256(path)
        except OSError as error:  # of a bad disk
            return f"{path}: {error.strerror}"
        if digest != expected["sha256"]:
            return f"{path}: its contents are not those that were written"
    return None


def _problem(action: Callable[[], Any]) -> str | None:
    """Why the file system refused `action`; None if it did not."""
    try:
        action()
    except OSError as error:
        place = error.filename2 or error.filename  # of a copy, where it goes
        return f"{place}: {error.strerror}" if place else str(error.strerror)
    return None


def _largest_share(tensors: Sequence[Tensor]) -> int:
    """An upper bound on the bytes that `gather_own` gives to any rank."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return sum(sizes) // dist.get_world_size() + max(sizes, default=0)


def _spare_host_bytes() -> int:
    """Half of this machine's free memory, or of its container's, for each rank on it."""
    return free_host_bytes() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _to_disk(path: Path) -> Plain:
    """The file's entry in the manifest, once its contents are on disk."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
