"""train.py, of which rank 1 is killed in its seventh step; torchrun starts it anew, once."""

import os
import signal
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[2]))

import train

FIRST = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
OUTPUT = Path(sys.argv[-1].removeprefix("output_dir="))
updates = iter(range(1, 1000))


def die(*_: object) -> None:
    if next(updates) == 6 and FIRST:
        while not (OUTPUT / "checkpoints/step-00000004").exists():  # written behind the steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


register_optimizer_step_post_hook(die)
sys.exit(train.main())
