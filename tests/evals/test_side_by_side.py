"""eval.py samples: a model and its reference on one page."""

import transformers

import eval as command


def test_the_command_shows_both_models(other, demo, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    given = ["samples", str(other), "--reference", str(demo / "sft"), "--prompts", str(prompts)]
    assert command.main([*given, "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"| reference: sft | policy: {other.name} |" in shown
    out = tmp_path / "samples.md"
    assert command.main([*given, "--max-new-tokens", "3", "--out", str(out)]) == 0
    assert out.read_text() == shown.removesuffix("\n")
    assert command.main([*given, "--out", str(out)]) == 2
    assert "the file exists" in capsys.readouterr().err


def test_models_of_other_vocabularies_are_refused(demo, tiny_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    smaller = tmp_path / "smaller"
    config = transformers.MistralConfig.from_pretrained(demo / "sft")
    config.vocab_size += 64
    transformers.MistralForCausalLM(config).save_pretrained(smaller)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (smaller / name).write_bytes((demo / "sft" / name).read_bytes())
    given = ["samples", str(demo / "sft"), "--prompts", str(prompts), "--reference"]
    assert command.main([*given, str(smaller)]) == 2
    assert "has a vocabulary of" in capsys.readouterr().err
    assert command.main([*given, str(tiny_folder)]) == 2
    assert "no tokenizer.json or tokenizer.model" in capsys.readouterr().err
