"""Sharded over the ranks, a model answers prompts; torchrun starts this for test_samples.py."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import eval as command
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.generate.prompts import read_prompt_set
from notus.generate.samples import write_samples
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights

model_folder, prompt_file, out = (Path(given) for given in sys.argv[1:])
ranks = distributed.start("cpu")
with torch.device("meta"):
    model = MistralForCausalLM(read_shape(model_folder))
distributed.shard_model(
    model,
    distributed.make_mesh(ranks, None, 1),
    ranks.device,
    compute_dtype=torch.float32,
    activation_checkpointing="full",
    compile_blocks=False,
    cpu_offload=False,
)
load_weights(model, model_folder)
for count in (5, 1):
    responses = write_samples(
        model,
        load_tokenizer(model_folder),
        read_prompt_set(str(prompt_file)).prompts[:count],
        max_new_tokens=6,
        temperature=0.9,
        seed=7,
        system_prompt=None,
        device=ranks.device,
    )
    (out / f"{count}-{ranks.rank}.json").write_text(json.dumps(responses))

stop, distributed.stop = distributed.stop, lambda: None  # the command would leave the group
given = ["generate", str(model_folder), "--prompts", str(prompt_file), "--max-new-tokens", "4"]
code = command.main([*given, "--out", str(out / "out.jsonl"), "--name", "out"])
stop()
sys.exit(code)
