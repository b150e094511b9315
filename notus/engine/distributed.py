"""Processes, device mesh and sharding, which turn the plain model into a distributed one.

torchrun on any number of nodes and a single process take the same path.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from notus.console import emit
from notus.engine.compilation import compile_repeatably
from notus.engine.rendezvous import fresh_store
from notus.errors import UserError, agreed
from notus.model.mistral import MistralForCausalLM

Item = TypeVar("Item")
Result = TypeVar("Result")

# Rank 0 may hash or download for minutes while others wait in a collective.
TIMEOUT = timedelta(minutes=60)

SECONDS_AT_EXIT = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process: its rank, the number of ranks, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes shared files."""
        return self.rank == 0

    def say(self, text: str, verbatim: bool = False) -> None:
        """Print on rank 0 only, as `emit` does."""
        if self.first:
            emit(text, verbatim=verbatim)


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, or make one of a single process.

    device: "cpu", "cuda", or "auto" for CUDA if there is a GPU. NCCL for tensors on CUDA, one GPU
    per local rank; gloo for those on the CPU. Raises UserError when a GPU is missing.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if processes > gpus:
            raise UserError(
                f"{processes} processes were started on this machine, where PyTorch "
                f"{torch.__version__} finds {gpus} GPUs; lower --nproc_per_node, or give "
                "parallel.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        pass  # the calling program has joined one itself
    elif "RANK" in os.environ:
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = fresh_store(store, rank, count, TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    _wait_at_exit()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _wait_at_exit() -> None:
    """When this process ends, give gloo's threads time to release the last collective's tensors.

    They need Python's lock for that: a thread that is too late, on a busy machine, aborts the
    process (pytorch/pytorch issue 190489). destroy_process_group waits for the threads only if
    nothing else holds the group, and after the first DTensor something does. The wait makes the
    abort unlikely; only PyTorch can exclude it.
    """
    atexit.register(time.sleep, SECONDS_AT_EXIT)


def map_over_ranks(
    items: Sequence[Item], function: Callable[[Sequence[Item]], Result]
) -> list[Result]:
    """Call `function` on a contiguous share of `items` per rank; returns all ranks' results.

    They are in the order of the ranks, on every rank. A UserError on any rank is raised on all.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bounds = [len(items) * r // ranks for r in range(ranks + 1)]
    with agreed():
        own = function(items[bounds[rank] : bounds[rank + 1]])
    results: list[Result] = [own] * ranks
    dist.all_gather_object(results, own)
    return results


def make_mesh(ranks: Ranks, shard: int | None, replicate: int) -> DeviceMesh:
    """The device mesh: parameters are sharded over "shard" and repeated over "replicate".

    shard None: the number of ranks divided by `replicate`. Raises UserError when the product is
    not the number of ranks.
    """
    if shard is None:
        shard = max(1, ranks.count // replicate)
    if shard * replicate != ranks.count:
        raise UserError(
            f"parallel.shard ({shard}) x parallel.replicate ({replicate}) is {shard * replicate}, "
            f"but {ranks.count} processes were started; expected the same number"
        )
    kind = ranks.device.type
    if replicate == 1:
        return init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(
    model: MistralForCausalLM,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: str,
    compile_blocks: bool,
    cpu_offload: bool,
    dropout: bool = False,
) -> None:
    """Checkpoint activations of, then compile, then shard a model on the meta device, in place.

    Afterwards parameters are sharded, uninitialised, in the dtype they were made in. They are cast
    to compute_dtype when gathered. Gradients are summed in float32 over all ranks, never averaged:
    the loss is divided once, by the number of pairs in the global step. dropout: whether blocks
    draw random numbers, which recomputation must then draw again.
    """
    if compile_blocks:
        compile_repeatably()
    for block in model.model.layers:
        if activation_checkpointing != "none":
            block.forward = _recomputed(block.forward, activation_checkpointing, dropout)
        if compile_blocks:
            # Rows differ in length. Compiled for the first length and only then for all, a resumed
            # run would round its first steps differently from the uninterrupted run.
            block.forward = torch.compile(block.forward, dynamic=True)
    offload, on_gpu = OffloadPolicy(), device.type == "cuda"
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=on_gpu)
    if cpu_offload and on_gpu:  # the optimiser's step is the CPU's; torchrun sets one thread
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    shard = partial(
        fully_shard,
        mesh=mesh,
        # The root too: between steps `model.parameters()` must be the sharded ones, and a forward
        # pass without a backward one would leave the root's gathered.
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        offload_policy=offload,
    )
    units = [*model.model.layers]
    if not model.shape.tie_word_embeddings:  # a tied head is the embedding, in the root
        units.append(model.lm_head)
    units.append(model)
    for unit in units:
        shard(unit)
    for unit in units if mesh.size() > 1 else ():  # one rank would divide every gradient by 1
        unit.set_gradient_divide_factor(1.0)
        # Without this, a factor of 1 asks for a premultiplied sum, which gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=torch.device("cpu") if cpu_offload else device)


def accumulate(
    model: MistralForCausalLM, batches: Iterable[Item], count: int, keep_gathered: bool
) -> Iterator[Item]:
    """Yield a step's `count` microbatches; FSDP does what only the last one needs only there.

    Gradients are reduced over the replicas of a hybrid mesh once per step. With `keep_gathered`
    parameters are gathered once per step too, and stay gathered in compute_dtype until the step's
    last backward pass has used them: less communication, but 2 bytes of bfloat16 more for every
    parameter of the model.
    """
    parameter = next(model.parameters())
    # Where a copy of the model is on one rank, its gradients can wait in float32 for the last
    # microbatch: they take no more memory than sharded, unless those would be on the host.
    undivided = parameter.device_mesh["shard"].size() == 1
    waits = undivided and parameter.device.type == parameter.device_mesh.device_type
    model.set_reshard_after_forward(not keep_gathered)
    for index, batch in enumerate(batches, start=1):
        last = index == count
        model.set_requires_gradient_sync(last or not waits)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not keep_gathered)
        yield batch
    model.set_reshard_after_forward(True)


# "selective" keeps the results of the costly operations: matrix products and attention.
KEPT_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
}


def _recomputed(forward: Callable, mode: str, dropout: bool) -> Callable:
    """A forward that keeps only its inputs ("full"), or also the costly results ("selective")."""
    context = {}
    if mode == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_costly)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=dropout, **context)


def _keep_costly(context, operation, *args, **kwargs) -> CheckpointPolicy:
    kept = operation in KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
