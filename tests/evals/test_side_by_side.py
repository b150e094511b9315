"""eval.py samples: a model and its reference on one page."""

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
    assert "exists already" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(demo, tiny_folder, capsys):
    given = ["samples", str(demo / "sft"), "--prompts", str(demo / "prompts.jsonl"), "--reference"]
    assert command.main([*given, str(tiny_folder)]) == 2
    assert "no tokenizer.json or tokenizer.model" in capsys.readouterr().err
