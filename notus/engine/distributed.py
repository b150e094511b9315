"""Processes, device mesh and sharding: what turns the plain model into a distributed one.

Started by torchrun on any number of nodes, or as a single process; both take the same path.
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

from notus.agreement import agree
from notus.engine.rendezvous import fresh_store
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM

Item = TypeVar("Item")
Result = TypeVar("Result")

# Rank 0 may hash or download for minutes while others wait in a collective.
TIMEOUT = timedelta(minutes=60)

SECONDS_AT_EXIT = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes shared files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, not once a rank."""
        if self.first:
            print(text, flush=True)


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, or make one of a single process.

    device: "cpu", "cuda", or "auto" for CUDA where there is any. NCCL for tensors on CUDA, one GPU
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
        pass  # called from a program that has joined one itself
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
    """When this process ends, give gloo's threads time to let go of the last collective's tensors.

    For that they need Python's lock: one that comes too late, on a busy machine, aborts the process
    (pytorch/pytorch issue 190489). destroy_process_group waits for them only where nothing else
    holds the group, and once there has been a DTensor, something does. A wait makes it unlikely;
    only PyTorch can exclude it.
    """
    atexit.register(time.sleep, SECONDS_AT_EXIT)


def check_host_memory(parameters: int, ranks: Ranks) -> None:
    """Refuse to train on the CPU what its memory cannot hold.

    parameters: of the whole model. Counts 12 bytes each, float32 weights, gradients and one
    optimiser moment, for this machine's share of the ranks. Raises UserError.
    """
    if ranks.device.type != "cpu":
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / ranks.count
    needed = 12 * parameters * here / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > memory:
        raise UserError(
            f"no CUDA device was found (PyTorch {torch.__version__}), and {parameters:,} "
            f"parameters take at least {needed:.0f} GiB of this machine's {memory:.0f} GiB to "
            "train on the CPU; start on a machine with GPUs and a CUDA build of PyTorch, or check "
            "everything else here with --dry-run"
        )


def divide(items: Sequence[Item], function: Callable[[Sequence[Item]], Result]) -> list[Result]:
    """Give each rank a contiguous share of `items`; every rank gets all ranks' results, in order.

    A UserError on any rank is raised on all of them.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bounds = [len(items) * r // ranks for r in range(ranks + 1)]
    own = agree(lambda: function(items[bounds[rank] : bounds[rank + 1]]))
    results: list[Result] = [own] * ranks
    dist.all_gather_object(results, own)
    return results


def make_mesh(ranks: Ranks, shard: int | None, replicate: int) -> DeviceMesh:
    """The device mesh: parameters are sharded over "shard" and repeated over "replicate".

    shard None takes all ranks that `replicate` leaves. Raises UserError when the product is not
    the number of ranks.
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
    """Activation checkpointing, then compilation, then sharding, of a model on the meta device.

    Afterwards parameters are sharded, uninitialised, in the dtype they were made in. They are cast
    to compute_dtype when gathered. Gradients are summed in float32 over all ranks, never averaged:
    the loss is divided once, by the number of pairs in the global step. dropout: whether blocks
    draw random numbers, which recomputation must then draw again.
    """
    for block in model.model.layers:
        if activation_checkpointing != "none":
            block.forward = _recomputed(block.forward, activation_checkpointing, dropout)
        if compile_blocks:
            # Rows differ in length. Compiled for the first one and then for all, a run that goes on
            # from a checkpoint would round its first steps otherwise than the run did.
            block.forward = torch.compile(block.forward, dynamic=True)
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
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
    if not model.shape.tie_word_embeddings:  # a tied head lives with the embedding, in the root
        units.append(model.lm_head)
    units.append(model)
    for unit in units:
        shard(unit)
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        # Without this, a factor of 1 asks for a premultiplied sum, which gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=torch.device("cpu") if cpu_offload else device)


def accumulate(
    model: MistralForCausalLM, batches: Iterable[Item], count: int, keep_gathered: bool
) -> Iterator[Item]:
    """Hand out a step's `count` microbatches, and spare FSDP what only the last of them needs.

    Gradients are reduced over the replicas of a hybrid mesh once a step. With `keep_gathered` the
    parameters are gathered once a step too and stay, in compute_dtype, until its last backward pass
    has used them: less communication, 2 bytes of bfloat16 more for every parameter of the model.
    """
    model.set_reshard_after_forward(not keep_gathered)
    for index, batch in enumerate(batches, start=1):
        last = index == count
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not keep_gathered)
        yield batch
    model.set_reshard_after_forward(True)


# What "selective" keeps: the results of matrix products and attention, the costly operations.
KEPT_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
}


def _recomputed(forward: Callable, mode: str, dropout: bool) -> Callable:
    """A forward that keeps its inputs alone ("full"), or also the costly results ("selective")."""
    context = {}
    if mode == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_costly)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=dropout, **context)


def _keep_costly(context, operation, *args, **kwargs) -> CheckpointPolicy:
    kept = operation in KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
