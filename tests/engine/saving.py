"""A process group of one, an optimiser with some state, and a saver, for tests of checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from notus.engine.optim import make_optimizer
from notus.engine.saver import Saver
from notus.model.mistral import MistralForCausalLM


@pytest.fixture(autouse=True, scope="module")
def one_process():
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def updated(model: MistralForCausalLM, steps: int = 1, **settings) -> torch.optim.Optimizer:
    """An optimiser that has applied so many random gradients to the model."""
    settings = {"name": "adamw", "learning_rate": 0.1, "weight_decay": 0.1} | settings
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, betas=(0.9, 0.99), alpha=0.9, eps=1e-8, **settings)
    torch.manual_seed(steps)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def saver(root: Path, source: Path, keep: int = 2, **options) -> Saver:
    return Saver(root, keep=keep, source=source, facts={"common": {"steps": 9}}, **options)
