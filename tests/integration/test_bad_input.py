"""Whatever a user can get wrong ends in one message that says what to do, and writes nothing.

train.py's `main` runs in this process on a small model and eight pairs, one thing about which is
spoilt. Each message must name the place, what was found and what was expected.
"""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from ranks import run_ranks

WEIGHTS = Path("policy/model.safetensors")
INDEX = Path("policy/model.safetensors.index.json")
GOOD_ROW = {"prompt": "Say a.", "chosen": " a", "rejected": " b"}
CHAT_ROW = {
    "prompt": [{"role": "user", "content": "Say a."}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.fixture
def place(demo, tmp_path, monkeypatch):
    """A working directory where `train.py config.json` would train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    shutil.copytree(demo / "sft", "policy")
    write_rows(*[{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " no"} for i in range(8)])
    config = {
        "model": {"policy": "policy", "compute_dtype": "float32"},
        "data": {
            "train": [{"path": "pairs.jsonl"}],
            "max_length": 64,
            "max_prompt_length": 32,
            "tokens_per_microbatch": 256,
        },
        "train": {"pairs_per_step": 4},
        "parallel": {"activation_checkpointing": "none"},
        "output_dir": "out",
    }
    Path("config.json").write_text(json.dumps(config))
    return tmp_path


def write_rows(*rows: dict | str) -> None:
    """pairs.jsonl anew: a line per row, text as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path("pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write(file: str | Path, text: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def edit(file: str | Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    entries = json.loads(Path(file).read_text()) | changes
    kept = {key: value for key, value in entries.items() if value is not None}
    Path(file).write_text(json.dumps(kept))


def edit_tensors(changes: dict, folder: str = "policy") -> None:
    """Change tensors of a model folder; None removes one."""
    file = Path(folder) / WEIGHTS.name
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def shrink_vocabulary(folder: str, size: int) -> None:
    edit(Path(folder) / "config.json", vocab_size=size)
    tensors = load_file(Path(folder) / WEIGHTS.name)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_tensors({name: tensors[name][:size].clone() for name in names}, folder)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refuse(capfd: pytest.CaptureFixture, *arguments: str, config: str = "config.json") -> str:
    """Run train.py, which must refuse, say why and write nothing; returns the message."""
    before = contents(Path.cwd())
    capfd.readouterr()
    code = train.main([config, *arguments])
    printed = capfd.readouterr().err
    assert code == 2
    first, *others = printed.splitlines()
    assert first.startswith("error: ") and all(one[:2] == "  " for one in others), printed
    after = contents(Path.cwd())
    assert [path for path in after if before.get(path, b"absent") != after[path]] == []
    assert before.keys() == after.keys()
    return printed


def check(message: str, *words: str) -> None:
    for part in words:
        assert part in message, message


def nothing() -> None:
    """Leave the folder as it is: the command line is at fault."""


def test_the_unspoilt_folder_is_accepted(place, capfd):
    before = contents(place)
    assert train.main(["config.json", "--dry-run"]) == 0
    assert capfd.readouterr().err == ""
    assert contents(place) == before


# Configuration and command line


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("nowhere.json", None, ("nowhere.json: cannot read", "No such file")),
        ("policy", None, ("policy: cannot read", "directory")),
        ("config.json", '{"model": {', ("config.json: not valid JSON (", "line 1 column 12")),
        ("config.json", "[]", ("config.json: found [], expected an object",)),
        ("config.json", '{"model": {}}', ("config.json: model.policy: missing, expected",)),
    ],
)
def test_configuration_file(place, capfd, file, text, words):
    if text is not None:
        write(file, text)
    check(refuse(capfd, config=file), *words)


def test_unknown_section(place, capfd):
    edit("config.json", optimiser={"name": "adamw"})
    message = refuse(capfd)
    check(message, "config.json: optimiser: unknown key; nearest valid key: optimizer")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "train.epoch=2",
            ("train.epoch: unknown key", "nearest valid key: train.epochs"),
        ),
        ("train.epochs=two", ('train.epochs: found "two"', "expected an integer of at least 1")),
        ("train.epochs", ('found "train.epochs"', "expected section.key=value")),
        ("optimizer.alpha=0.9", ("optimizer.alpha: has no effect, as only rmsprop uses it",)),
        ("model.compute_dtype=float16", ("model.compute_dtype:", 'found "float16"', '"bfloat16"')),
        ("data.tokenization=old", ("data.tokenization:", 'found "old"', '"trl-0.7.4"')),
        ("parallel.compile=maybe", ("parallel.compile:", 'found "maybe"', '"auto", true')),
        ("parallel.attention=flex", ('parallel.attention: found "flex" on the CPU', "no backward")),
        (
            "parallel.attention=varlen parallel.compile=true",
            ('parallel.attention: found "varlen" with parallel.compile', "not compiled"),
        ),
        ("loss.name=dpo", ("loss.name: unknown loss 'dpo'", "mean 'sigmoid'?", "one of sigmoid,")),
        (
            "loss.betta=1",
            ("loss.betta: unknown key; nearest valid key: loss.beta (loss 'sigmoid')",),
        ),
        (
            "loss.gamma=1",
            ("loss.gamma: unknown key; valid keys here: loss.beta, loss.lab", "(loss 'sigmoid')"),
        ),
        ("loss.beta=-1", ("loss.beta: found -1", "expected a number above 0")),
        ("loss.mix=[]", ("loss.mix: found [], expected a list of one or more values",)),
        (
            "reference.log_probs=none",
            ('reference.log_probs: found "none"', "loss sigmoid", 'expected "cached" or "online"'),
        ),
        ("loss.name=simpo model.reference=policy", ("model.reference: has no effect", "simpo")),
        (
            "loss.name=simpo reference.log_probs=online",
            ("reference.log_probs:", '"online"', "simpo uses no reference"),
        ),
        ("parallel.shard=2", ("parallel.shard (2)", "is 2, but 1 process")),
        ("parallel.replicate=2", ("parallel.replicate (2)", "is 2, but 1 process")),
        (
            "data.tokens_per_microbatch=4",
            ("pairs.jsonl:1: the pair takes", "tokens_per_microbatch is 4", "max_length"),
        ),
        ("model.policy=nowhere", ("nowhere: no such model folder", "hub is out of reach")),
        ("model.policy=some/thing", ("some/thing: no such model folder", "hub is out of reach")),
        (
            "model.policy=./no/where",
            ("./no/where: no such model folder", "cannot be a"),
        ),
        ("model.policy=pairs.jsonl", ("pairs.jsonl: found a file, expected the folder",)),
        ("model.reference=nowhere", ("nowhere: no such model folder", "hub is out of reach")),
        ("data.train.0.path=nowhere.jsonl", ("nowhere.jsonl: no such file or folder",)),
        ("data.train.0.path=some/thing", ("some/thing: neither a local file", "hub")),
        (
            "data.train.0.path=policy",
            ("policy/config.json:1: not JSON", "expected one object per line"),
        ),
        ("data.train.0.format=dpo", ('pairs.jsonl:1: no preference format "dpo"', "known are")),
        (
            'data.train.0.curation={"rule":"mean-rating"}',
            ('pairs.jsonl: "curation" does nothing', "remove it"),
        ),
        ('data.eval=[{"path":"no.jsonl"}]', ("no.jsonl: no such file or folder",)),
        ('data.eval={"holdout":9}', ("data.eval.holdout is 9", "only 8 rows")),
        ('evaluation.samples={"prompts":"no.jsonl"}', ("no.jsonl: no such file or folder",)),
        ("--resume nowhere", ("--resume nowhere: no manifest.json", "expected auto, never, or")),
        ("--resume policy", ("--resume policy: no manifest.json", "a complete checkpoint")),
        ("output_dir=config.json", ("output_dir: config.json", "is a file")),
        ("output_dir=config.json/out", ("output_dir: config.json/out", "config.json is a file")),
        ("output_dir=policy", ("output_dir: policy is not empty and holds no run", "another")),
    ],
)
def test_one_wrong_setting(place, capfd, overrides, words):
    check(refuse(capfd, *overrides.split()), *words)


def test_an_unknown_option_shows_the_usage(place, capfd):
    with pytest.raises(SystemExit) as stopped:
        train.main(["config.json", "--dryrun"])
    assert stopped.value.code == 2
    check(capfd.readouterr().err, "unrecognized arguments: --dryrun", "[--dry-run]")


# Data


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("pairs.jsonl: holds no rows",)),
        ([""], ("pairs.jsonl: holds no rows",)),
        (["[]"], ("pairs.jsonl: holds no rows",)),
        (
            [GOOD_ROW, {"prompt": "a", "chosen": "b"}],
            ('pairs.jsonl:2: "rejected" is missing; expected text or a list of messages',),
        ),
        (
            [GOOD_ROW, {"prompt": "a", "chosen": None, "rejected": "b"}],
            ('pairs.jsonl:2: "chosen" is null; expected text or a list of messages',),
        ),
        (
            [{"prompt": "a", "rejected": "b"}],
            ("pairs.jsonl:1:", "columns prompt, rejected", 'near is "preference" without'),
        ),
        (
            [{"text": "a", "label": 1}],
            ("pairs.jsonl:1: not a known preference", "columns text, label", 'near is "'),
        ),
        ([GOOD_ROW, '{"prompt": "a", '], ("pairs.jsonl:2: not JSON", "one object per line")),
        (["hello"], ("pairs.jsonl:1: not JSON: Expecting value at column 1", "expected one")),
        ([GOOD_ROW, "3"], ("pairs.jsonl:2: the row is a number; expected an object",)),
        (
            [
                GOOD_ROW | {"rejected": GOOD_ROW["chosen"]},
                GOOD_ROW | {"chosen": ""},
                GOOD_ROW | {"rejected": " "},
            ],
            (
                "pairs.jsonl: no pair is left;",
                "1 identical responses, 1 empty chosen response, 1 empty rejected response",
            ),
        ),
        (
            [GOOD_ROW, {"prompt": "Ad", "chosen": "d 9 and 4.", "rejected": "4"}],
            ("pairs.jsonl:2: the prompt is not a token prefix", "'Ad'", "expected the response"),
        ),
    ],
)
def test_rows(place, capfd, rows, words):
    write_rows(*rows)
    check(refuse(capfd), *words)


def test_unusable_pairs_are_dropped_and_counted(place, capfd):
    write_rows(GOOD_ROW, GOOD_ROW | {"rejected": GOOD_ROW["chosen"]}, GOOD_ROW | {"chosen": ""})
    assert train.main(["config.json", "--dry-run"]) == 0
    words = ("1 pair", "1 dropped: identical responses", "1 dropped: empty chosen response")
    check(capfd.readouterr().out, *words)


def test_no_pair_is_short_enough(place, capfd):
    data = {"train": [{"path": "pairs.jsonl"}], "truncation": "drop", "max_length": 1}
    edit("config.json", data=data)
    message = refuse(capfd)
    check(message, "pairs.jsonl: no pair is left", "8 dropped: longer than max_length")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            None,
            ("pairs.jsonl:1: a conversation, but", "no chat template; expected"),
        ),
        (
            "{{ messages | length }}{{ messages[-1]['content'] }}",
            ("pairs.jsonl:1: the rendered prompt is not a prefix of its branch", "'1Say a.'"),
        ),
        ("{{ raise_exception('no chats') }}", ("pairs.jsonl:1: the chat template", "no chats")),
        ("{{ messages[0]['content'] + 1 }}", ("pairs.jsonl:1: the chat template", "concatenate")),
    ],
)
def test_chat_template(place, capfd, template, words):
    write_rows(CHAT_ROW)
    edit("policy/tokenizer_config.json", chat_template=template)
    check(refuse(capfd), *words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, ("prompts.jsonl:1: the columns are text; expected prompt, or ",)),
        ({"prompt": [1]}, ("prompts.jsonl:1", "prompt", "expected")),
        ({"prompt": "a", "answer": 4}, ("prompts.jsonl:1: answer: found 4, expected a string",)),
    ],
)
def test_sample_prompts_are_checked_before_training(place, capfd, row, words):
    write("prompts.jsonl", json.dumps(row))
    check(refuse(capfd, 'evaluation.samples={"prompts":"prompts.jsonl"}'), *words)


# Models


def longrope() -> None:
    edit("policy/config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})


def yarn() -> None:
    edit("policy/config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path("policy/config.json").unlink, ("policy: no config.json", "expected a Hugging Face")),
        (lambda: write("policy/config.json", "{"), ("policy/config.json: not valid JSON",)),
        (
            lambda: write("policy/config.json", "[]"),
            ("policy/config.json: expected a JSON object, found list",),
        ),
        (
            lambda: Path("policy/config.json").write_bytes(b"\xff\xfe"),
            ("policy/config.json: not valid JSON", "utf-8"),
        ),
        (
            lambda: edit("policy/config.json", architectures=["GPT2LMHeadModel"]),
            ("policy/config.json: architecture is GPT2LMHeadModel, expected", "MistralForCausalLM"),
        ),
        (
            lambda: edit("policy/config.json", architectures=None),
            ("policy/config.json: architecture is none named, expected", "MistralForCausalLM"),
        ),
        (
            lambda: edit("policy/config.json", hidden_size=None),
            ("policy/config.json: hidden_size: missing, expected an integer from 1 to 1048576",),
        ),
        (
            lambda: edit("policy/config.json", hidden_size="32"),
            ('policy/config.json: hidden_size: found "32", expected an integer from 1 to 1048576',),
        ),
        (
            lambda: edit("policy/config.json", sliding_window=0),
            ("policy/config.json: sliding_window: found 0, expected an integer from 1 to 2147",),
        ),
        (
            lambda: edit("policy/config.json", num_key_value_heads=3),
            ("policy/config.json: num_key_value_heads: found 3, expected a divisor", "4"),
        ),
        (
            lambda: edit("policy/config.json", head_dim=7),
            ("policy/config.json: head_dim: found 7, expected an even number",),
        ),
        (
            lambda: edit("policy/config.json", rope_parameters={"rope_theta": "1e4"}),
            ('policy/config.json: rope_theta: found "1e4", expected a number above 1',),
        ),
        (
            lambda: edit("policy/config.json", rope_parameters=[1]),
            ("policy/config.json: the rope settings are [1], expected an object",),
        ),
        (longrope, ("config.json: rope scaling 'longrope' found, expected none, 'llama3' or",)),
        (yarn, ("policy/config.json: yarn.factor: missing, expected a number above 0",)),
        (
            lambda: edit("policy/config.json", tie_word_embeddings="no"),
            ('policy/config.json: tie_word_embeddings: found "no", expected true or false',),
        ),
        (
            lambda: edit("policy/config.json", quantization_config={"quant_method": "gptq"}),
            ("policy/config.json: quantization_config found (gptq), expected weights in float32",),
        ),
        (WEIGHTS.unlink, ("policy: no model.safetensors or", "expected safetensors weights")),
        (
            lambda: edit_tensors({"model.norm.weight": None}),
            ("policy: tensor model.norm.weight: found none, expected (32,)",),
        ),
        (
            lambda: edit_tensors({"model.norm.weight": torch.ones(3)}),
            ("policy: tensor model.norm.weight: found (3,), expected (32,)",),
        ),
        (
            lambda: edit_tensors({"model.layers.9.extra": torch.ones(3)}),
            ("policy: tensor model.layers.9.extra: found (", "expected none by config.json"),
        ),
        (
            lambda: cut(WEIGHTS, 100_000),
            ("policy/model.safetensors: found no complete safetensors file", "expected one"),
        ),
        (lambda: cut(WEIGHTS, 0), ("policy/model.safetensors: found no complete", "expected one")),
        (lambda: write(INDEX, "{"), (f"{INDEX}: not valid JSON",)),
        (lambda: write(INDEX, "{}"), (f'{INDEX}: found no "weight_map", expected',)),
        (lambda: write(INDEX, "[]"), (f"{INDEX}: expected a JSON object, found list",)),
        (
            lambda: write(INDEX, '{"weight_map": {"lm_head.weight": "model-1.safetensors"}}'),
            ("policy/model-1.safetensors: cannot be read (No such file",),
        ),
        (
            lambda: edit("policy/config.json", num_hidden_layers=10**9),
            ("policy/config.json: num_hidden_layers: found 1000000000, expected an integer from",),
        ),
        (
            lambda: edit_tensors({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            ("policy/model.safetensors: tensor model.norm.weight: found I8, expected one of F64",),
        ),
        (
            lambda: write(INDEX, '{"weight_map": {"lm_head.weight": "../model.safetensors"}}'),
            (f"{INDEX}: found '../model.safetensors', expected a file of this folder",),
        ),
        (
            lambda: shrink_vocabulary("policy", 400),
            (
                "policy: the tokenizer has 450 tokens",
                "vocab_size is 400; expected at least as many",
            ),
        ),
        (
            lambda: edit_tensors({"model.norm.weight": torch.full((32,), torch.nan)}),
            ("policy/model.safetensors: tensor model.norm.weight holds NaN", "expected finite"),
        ),
    ],
)
def test_model_folder(place, capfd, spoil, words):
    spoil()
    check(refuse(capfd), *words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path("policy/tokenizer.json").unlink, ("policy: no tokenizer.json or", "a tokenizer")),
        (lambda: cut(Path("policy/tokenizer.json"), 9000), ("policy", "tokenizer", "read")),
        (lambda: write("policy/tokenizer.json", "{}"), ("policy", "tokenizer", "read")),
        (
            lambda: edit("policy/tokenizer.json", model={"type": "BPE"}),
            ("policy", "tokenizer", "read"),
        ),
        (lambda: write("policy/tokenizer_config.json", "{"), ("policy", "tokenizer", "read")),
        (
            lambda: edit("policy/tokenizer_config.json", eos_token=None),
            ("policy/tokenizer_config.json: no eos_token; expected one",),
        ),
    ],
)
def test_tokenizer(place, capfd, spoil, words):
    spoil()
    check(refuse(capfd), *words)


def test_a_reference_with_another_vocabulary(place, capfd):
    shutil.copytree("policy", "other")
    shrink_vocabulary("other", 400)
    message = refuse(capfd, "model.reference=other")
    check(message, "model.reference: other", "400", "450")


# output_dir and checkpoints


@pytest.mark.parametrize(
    ("file", "text"),
    [("notes.txt", "mine"), ("config.json", "{"), ("config.json", "[]"), ("config.json", "{}")],
)
def test_an_output_dir_that_holds_something_else(place, capfd, file, text):
    write(Path("out") / file, text)
    check(refuse(capfd), "output_dir: out is not empty and holds no run; give another output_dir")


@pytest.fixture
def finished(place, capfd):
    """A run of one step in out/."""
    assert train.main(["config.json", "train.max_steps=1"]) == 0
    return place / "out"


def test_an_output_dir_that_holds_another_run(finished, capfd):
    message = refuse(capfd, "train.max_steps=2", "loss.beta=0.5")
    check(message, "output_dir: out holds another run", "loss.beta was 0.1 and is 0.5")
    check(message, "train.max_steps was 1 and is 2", "give another output_dir")
    message = refuse(capfd, "train.max_steps=1", "--resume", "never")
    check(message, "output_dir: out holds a run, and --resume is never; give another output_dir")


def test_a_checkpoint_of_another_run(finished, capfd):
    checkpoint = "out/checkpoints/step-00000001"
    options = ("output_dir=new", "train.max_steps=1", "--resume", checkpoint)
    message = refuse(capfd, "loss.beta=0.5", *options)
    check(message, f"{checkpoint}: made by another run (loss.beta was 0.1 and is 0.5)")
    check(message, "another output_dir")
    file = Path(json.loads(Path("config.json").read_text())["model"]["policy"], "model.safetensors")
    original, weights = file.read_bytes(), load_file(file)
    weights["model.norm.weight"] += 0.1
    save_file(weights, file, metadata={"format": "pt"})
    message = refuse(capfd, *options)
    check(message, f"{checkpoint}: made by another run (the reference's weights differ")
    file.write_bytes(original)
    write_rows(*[GOOD_ROW] * 8)
    check(refuse(capfd, *options), f"{checkpoint}: made by another run (the training pairs' tokens")


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("manifest.json", lambda file: write(file, "{"), ("manifest.json: missing or not valid",)),
        ("manifest.json", Path.unlink, ("manifest.json: missing or not valid",)),
        ("state.json", Path.unlink, ("state.json: No such file or directory",)),
        (
            "model-00001-of-00001.safetensors",
            lambda file: cut(file, 99),
            ("model-00001-of-00001.safetensors: found 99 bytes, expected",),
        ),
    ],
)
def test_a_damaged_checkpoint(finished, capfd, file, spoil, words):
    shutil.rmtree(finished / "final")  # as if it had been interrupted before
    spoil(finished / "checkpoints/step-00000001" / file)
    message = refuse(capfd, "train.max_steps=1")
    check(
        message,
        *words,
        "no sound checkpoint is left in out/checkpoints: restore one, or start anew",
    )


# Several processes


def test_what_one_of_two_processes_finds_ends_both(place):
    # The text of row 8 can only be split by the second process, which tokenizes the latter half.
    write_rows(*[GOOD_ROW] * 7, {"prompt": "Ad", "chosen": "d 9 and 4.", "rejected": "4"})
    code, told = run_ranks(["config.json"], place / "log", ranks=2)
    messages = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(messages) == 1, told
    check(messages[0], "pairs.jsonl:8: the prompt is not a token prefix")
    assert "Traceback" not in told
    assert not Path("out").exists()
