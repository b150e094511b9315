"""The commands on a terminal of 80 columns: no line is longer, unless it is a command to copy."""

import json
import re
import shutil
from pathlib import Path

import pytest

import eval as evaluation_commands
import train
from notus.card import card
from notus.console import COMMAND
from notus.curation import command as curation
from notus.curation import report
from notus.evals import preferences
from notus.look import look
from runs import base_config


@pytest.fixture
def place(demo, tmp_path, monkeypatch):
    """A working directory with the demo, a configuration of two steps, and no figures."""
    monkeypatch.chdir(tmp_path)
    for module in (card, report):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(preferences, "figures", lambda *given: [])
    Path("demo").symlink_to(demo)
    config = base_config(Path("demo"))
    config["data"]["eval"] = {"holdout": 9}
    config["train"] |= {"max_steps": 2}
    Path("short.json").write_text(json.dumps(config | {"output_dir": "runs/a"}))


def test_no_line_is_longer_than_the_terminal(place, capsys, narrow):
    narrow(80)
    said = ""

    def run(main, words: str, code: int = 0) -> None:
        nonlocal said
        assert main(words.split()) == code, words
        said += "".join(capsys.readouterr())

    run(curation.main, "demo/preferences.jsonl --out pairs")
    run(look.main, "pairs --out page.html")
    run(train.main, "short.json --dry-run --gpus 8 --gpu a100-40gb parallel.device=auto")
    run(train.main, "short.json")
    run(train.main, "short.json")
    run(train.main, "short.json loss.beta=0.2", code=2)
    run(card.main, "runs/a")
    shutil.copytree("runs/a", "runs/b")
    settings = json.loads(Path("runs/b/config.json").read_text())
    settings["loss"]["beta"] = 0.2
    Path("runs/b/config.json").write_text(json.dumps(settings))
    run(evaluation_commands.main, "compare runs/a runs/b")
    run(evaluation_commands.main, "compare runs/a --to notus-7b-v1")
    scored = "--max-length 96 --compute-dtype float32 --device cpu --out scored"
    run(evaluation_commands.main, f"preferences runs/a --data pairs {scored}")
    short = "--max-new-tokens 2 --device cpu --out answers.jsonl"
    run(evaluation_commands.main, f"generate runs/a --prompts demo/prompts.jsonl {short}")

    for words in ("FITS on", "2 steps of 24 pairs", "nothing left", "± s.e.", "wrote scored"):
        assert words in said, said
    long = [line for line in re.split("[\r\n]", said) if len(line) > 80 and not COMMAND.match(line)]
    assert not long, "\n".join(long)
