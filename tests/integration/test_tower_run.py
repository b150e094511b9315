"""A run on the decoder of a vision model: Ministral 3, longer than its original context."""

import json
import shutil

import torch
import transformers
from towers import YARN, write_tower

from conftest import TINY
from runs import base_config, run, stored


def test_two_ranks_train_it_resume_and_write_a_text_model(demo, tmp_path):
    tower, output, again = (tmp_path / name for name in ("tower", "run", "again"))
    words = json.loads((demo / "sft/config.json").read_text())
    decoder = transformers.Ministral3Config(
        **TINY | {"vocab_size": words["vocab_size"]},
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters=YARN | {"original_max_position_embeddings": 16},
    )
    write_tower(tower, decoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / "sft" / name, tower / name)
    config = base_config(demo)
    config["model"]["policy"] = str(tower)
    config["train"] |= {"max_steps": 2}
    config["checkpoint"] = {"every": 1}
    first = str(output / "checkpoints/step-00000001")
    runs = [[f"output_dir={output}"], [f"output_dir={again}", "--resume", first]]
    told = run(config, runs, tmp_path, ranks=2)
    assert f"{tower}: its vision tower is left out; the language model is trained" in told

    assert "step-00000001 after 1 step" in told
    last = "checkpoints/step-00000002"
    for prefix in ("model", "optimizer"):
        expected, found = stored(output / last, prefix), stored(again / last, prefix)
        assert expected.keys() == found.keys() and len(expected) > 10
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    for folder in (output / last, output / "final"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert isinstance(model, transformers.Ministral3ForCausalLM)
        assert not any(report.values()), report
        assert model.config.vocab_size == words["vocab_size"]
