"""Sharded over the ranks, each of which calls `main`, a model answers prompts."""

import json
from pathlib import Path

import torch

import eval as command
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.generate.prompts import read_prompt_set
from notus.generate.samples import write_samples
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights


def main(model_folder: Path, prompt_file: Path, out: Path) -> int:
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
    return code
