"""Every key, every error message, overrides, and that no key is dead."""

import ast
import inspect
import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notus.config import Config, Holdout, load_config, to_dict
from notus.curation.curate import Curation
from notus.data.preferences import Source
from notus.errors import UserError

ROOT = Path(__file__).parents[1]
MINIMAL = {"model": {"policy": "sft"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "o"}
EVAL = {**MINIMAL["data"], "eval": {"holdout": 2}}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    resolved = to_dict(load_config(write(tmp_path, MINIMAL)))
    source = {"path": "a.jsonl", "split": None, "weight": 1.0, "longest_line": 2**26}
    source |= {"format": None, "columns": None, "ignore": None, "curation": None}
    assert resolved == {
        "model": {
            "policy": "sft",
            "reference": None,
            "lora": None,
            "compute_dtype": "bfloat16",
        },
        "data": {
            "train": [source],
            "eval": None,
            "max_length": 1024,
            "max_prompt_length": 512,
            "truncation": "pair",
            "tokenization": "clean",
            "system_prompt": None,
            "seed": None,
            "shuffle": True,
            "prefix_sharing": True,
            "tokens_per_microbatch": 8192,
        },
        "loss": {"name": "sigmoid", "mix": None},
        "reference": {"log_probs": "cached", "cache": None, "sync_every": None},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 5e-7,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "state_dtype": "float32",
            "max_grad_norm": 1.0,
        },
        "schedule": {"name": "linear", "warmup_ratio": 0.1},
        "train": {
            "objective": "dpo",
            "pairs_per_step": 64,
            "epochs": 1,
            "max_steps": None,
            "max_nonfinite": 3,
            "seed": 42,
        },
        "parallel": {
            "device": "auto",
            "shard": None,
            "replicate": 1,
            "cpu_offload": False,
            "keep_gathered": "auto",
            "activation_checkpointing": "full",
            "compile": "auto",
            "attention": "auto",
            "kernels": "auto",
        },
        "evaluation": {"samples": None},
        "log": {"every": 1, "to": ["tensorboard"]},
        "checkpoint": {"every": 500, "keep": 2},
        "output_dir": "o",
    }


def test_optimizer_defaults_are_torchs_own(tmp_path: Path) -> None:
    ours = load_config(write(tmp_path, MINIMAL)).optimizer
    parameter = torch.zeros(1, requires_grad=True)
    adamw = torch.optim.AdamW([parameter]).defaults
    rmsprop = torch.optim.RMSprop([parameter]).defaults
    assert (ours.betas, ours.eps) == (adamw["betas"], adamw["eps"])
    assert (ours.alpha, ours.eps) == (rmsprop["alpha"], rmsprop["eps"])


def test_sections_become_dataclasses(tmp_path: Path) -> None:
    curated = {"path": "u", "weight": 2, "curation": {"rule": "mean-rating"}}
    tree = {**MINIMAL, "data": {"train": [curated, {"path": "b"}], "eval": {"holdout": 2000}}}
    data = load_config(write(tmp_path, tree)).data
    first = Source(path="u", weight=2.0, curation=Curation(rule="mean-rating"))
    assert data.train == (first, Source(path="b")) and type(data.train[0].weight) is float
    assert data.eval == Holdout(holdout=2000)


def test_adapters_have_notus_s_targets_unless_told(tmp_path: Path) -> None:
    tree = {**MINIMAL, "model": {"policy": "sft", "lora": {"rank": 8, "alpha": 4}}}
    config = load_config(write(tmp_path, tree))
    assert to_dict(config)["model"]["lora"] == {
        "rank": 8,
        "alpha": 4.0,
        "dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "rslora": False,
        "merge": False,
    }
    everywhere = load_config(write(tmp_path, tree), ["model.lora.target_modules=all-linear"])
    assert everywhere.model.lora.target_modules == "all-linear"


def test_loss_takes_other_keys_unchecked(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "loss": {"name": "ipo", "beta": 1, "average": False}})
    loss = load_config(path).loss
    assert loss.options == {"beta": 1, "average": False}
    assert loss.section == {"name": "ipo", "beta": 1, "average": False}
    mix = [{"name": "sigmoid", "weight": 1.0}, {"name": "nll", "weight": 0.2}]
    mixed = load_config(write(tmp_path, {**MINIMAL, "loss": {"mix": mix}}))
    assert mixed.loss.section == {"mix": mix}
    assert to_dict(mixed)["loss"] == {"mix": mix}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "train": {"seed": 1}, "log": {"every": 5}})
    overrides = [
        "train.seed=7",
        "data.train.0.path=x=y.jsonl",
        "data.train.1.path=second",
        "data.eval.holdout=3",
        "loss.beta=0.25",
        "loss.label=text",
        "parallel.compile=false",
        "optimizer.betas=[0.5, 0.75]",
        "checkpoint.every=null",
        'output_dir="7"',
    ]
    config = load_config(path, overrides)
    assert config.train.seed == 7 and config.log.every == 5
    assert [source.path for source in config.data.train] == ["x=y.jsonl", "second"]
    assert config.data.eval == Holdout(holdout=3)
    assert config.loss.options == {"beta": 0.25, "label": "text"}
    assert config.parallel.compile is False and config.checkpoint.every is None
    assert config.optimizer.betas == (0.5, 0.75) and config.output_dir == "7"
    assert load_config(path, ["train.seed=8", "train.seed=9"]).train.seed == 9


@pytest.mark.parametrize(("given", "found"), [("~", ""), ("~/x", "/x"), ("a/~", None)])
def test_output_dir_may_be_below_the_home_folder(given, found, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(write(tmp_path, MINIMAL), [f"output_dir={given}"])
    assert config.output_dir == (given if found is None else f"{tmp_path}{found}")


def test_json_that_is_nested_too_deeply_is_refused(tmp_path) -> None:
    path, deep = write(tmp_path, MINIMAL), "[" * 100_000
    with pytest.raises(UserError, match=r'data.max_length: found "\[\[\[.*, expected an integer'):
        load_config(path, [f"data.max_length={deep}"])
    Path(path).write_text(deep)
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(path)


# A change to the minimal file, and everything after the file's name in the message.
WRONG_FILES = [
    ({"model": {}}, "model.policy: missing, expected a non-empty string"),
    ({"model": {"policy": ""}}, 'model.policy: found "", expected a non-empty string'),
    ({"model": "sft"}, 'model: found "sft", expected an object with the keys policy, reference, '),
    (
        {"output_dir": "~nobody-has-this-name/x"},
        'output_dir: found "~nobody-has-this-name/x", expected a path: no such home folder',
    ),
    (
        {"output_dir": "a\0b"},
        "output_dir: found 'a\\x00b', expected text without NUL and lone surrogates",
    ),
    (
        {"data": {"train": [{"path": "a"}], "system_prompt": "\ud800"}},
        "data.system_prompt: found '\\ud800', expected text without NUL and lone surrogates",
    ),
    ({"model": {"policy": "a", "lora": {"alpha": 1}}}, "model.lora.rank: missing, expected an int"),
    (
        {"model": {"policy": "a", "lora": {"rank": 0, "alpha": 1}}},
        "model.lora.rank: found 0, expected an integer from 1 to 1048576",
    ),
    (
        {"model": {"policy": "a", "lora": {"rank": 1, "alpha": 0}}},
        "model.lora.alpha: found 0.0, expected a number above 0",
    ),
    (
        {"model": {"policy": "a", "lora": {"rank": 1, "alpha": 1, "dropout": 1}}},
        "model.lora.dropout: found 1.0, expected a number from 0 to below 1",
    ),
    (
        {"model": {"policy": "a", "lora": {"rank": 1, "alpha": 1, "target_modules": "q_proj"}}},
        'model.lora.target_modules: found "q_proj", expected a list of one or more values, each a ',
    ),
    (
        {
            "model": {"policy": "a", "lora": {"rank": 1, "alpha": 1}},
            "reference": {"log_probs": "online", "sync_every": 2},
        },
        "model.lora: found with reference.sync_every 2, expected only one of them",
    ),
    ({"data": {"train": []}}, "data.train: found [], expected a list of one or more values, each "),
    ({"data": {"train": [{}]}}, "data.train.0.path: missing, expected a non-empty string"),
    ({"data": {**EVAL, "eval": {}}}, "data.eval: found {}, expected sources by name"),
    (
        {"data": {**EVAL, "eval": {"a/b": {"path": "x"}}}},
        'data.eval: found {"a/b": "..."}, expected',
    ),
    ({"data": {**EVAL, "eval": {"holdout": {"path": "x"}}}}, "and not holdout, seed, rewards"),
    ({"data": {**EVAL, "eval": {"new": {"pth": "x"}}}}, "nearest valid key: data.eval.NAME.path"),
    ({"data": {**EVAL, "eval": 5}}, "data.eval: found 5, expected a list of one or more values, "),
    ({"data": {**EVAL, "eval": {"holdout": 0}}}, "data.eval.holdout: found 0, expected an integer"),
    ({"train": {"seed": True}}, "train.seed: found true, expected an integer"),
    ({"train": {"seed": -1}}, "train.seed: found -1, expected an integer from 0 to 4294967295"),
    ({"train": {"epochs": 1.0}}, "train.epochs: found 1.0, expected an integer of at least 1"),
    ({"train": {"epochs": 0}}, "train.epochs: found 0, expected an integer of at least 1"),
    ({"train": {"max_steps": "9"}}, 'found "9", expected an integer of at least 1 or null'),
    ({"data": {**EVAL, "shuffle": 1}}, "data.shuffle: found 1, expected true or false"),
    ({"parallel": {"compile": 1}}, 'compile: found 1, expected "auto", true or false'),
    ({"schedule": {"name": "wsd"}}, 'found "wsd", expected "linear", "cosine" or "constant"'),
    ({"schedule": {"warmup_ratio": 1.1}}, "found 1.1, expected a number from 0 to 1"),
    ({"optimizer": {"betas": [0.9]}}, "found [0.9], expected a list of 2 values, each a number "),
    ({"optimizer": {"betas": [0.9, 1]}}, "optimizer.betas.1: found 1.0, expected a number from 0"),
    ({"optimizer": {"learning_rate": "5e-7"}}, 'optimizer.learning_rate: found "5e-7", expected a'),
    ({"loss": {"mix": {}}}, "loss.mix: found {}, expected a list of one or more values, each an "),
    ({"loss": {"mix": [{}], "name": "ipo"}}, "loss.name: has no effect, as loss.mix names the"),
    ({"loss": {"beta": float("nan")}}, "loss.beta: found NaN, expected a finite number"),
    ({"optimizer": {"eps": float("inf")}}, "optimizer.eps: found Infinity, expected a finite"),
    (
        {"data": {**EVAL, "max_length": 512}},
        "found 512 (the default is 512), expected less than data.max_length, 512",
    ),
    (
        {"data": {**EVAL, "truncation": "drop", "max_prompt_length": 5}},
        'data.max_prompt_length: has no effect, as data.truncation is "drop", and only "pair" ',
    ),
    (
        {"data": {**EVAL, "truncation": "drop", "tokenization": "trl-0.7.4"}},
        'data.tokenization: found "trl-0.7.4" with data.truncation "drop", expected "pair"',
    ),
    ({"optimizer": {"name": "rmsprop", "betas": [0, 0]}}, "optimizer.betas: has no effect, as"),
    ({"optimizer": {"alpha": 0.9}}, "optimizer.alpha: has no effect, as only rmsprop uses it"),
    ({"evaluation": {"every": 5}}, "evaluation.every: has no effect, as data.eval is null"),
    (
        {"data": {"train": [{"path": "a"}], "leaks": "drop"}},
        "data.leaks: has no effect, as data.eval is null",
    ),
    (
        {"data": {"train": [{"path": "a", "curation": {}}]}},
        "data.train: found a curation that does nothing, expected a rule, or prompts to leave out",
    ),
    (
        {"data": {"train": [{"path": "a", "curation": {"rejected": "lowest"}}]}},
        'data.train: found a curation with "rejected" and no "rule", expected both, or neither',
    ),
    (
        {"data": {"train": [{"path": "a", "curation": {"min_margin": 1}}]}},
        'data.train: found a curation with "min_margin", "min_chosen" or "agree" and no "rule", ',
    ),
    (
        {"data": {"train": [{"path": "a", "curation": {"rule": "rating", "match": "exact"}}]}},
        'data.train: found a curation with "match" and no "decontaminate", expected both, or',
    ),
    (
        {"data": {"train": [{"path": "a", "curation": {"rule": "best"}}]}},
        'data.train.0.curation.rule: found "best", expected "mean-rating", "overall-score", "over',
    ),
    (
        {"model": {"policy": "a", "reference": "b"}, "reference": {"log_probs": "none"}},
        'model.reference: has no effect, as reference.log_probs is "none"; leave it out',
    ),
    (
        {"model": {"policy": "a", "lora": {"rank": 1, "alpha": 1, "target_modules": 3}}},
        "target_modules: found 3, expected a list of one or more values, each a non-empty string "
        'or "all-linear"',
    ),
    (
        {"train": {"objective": "sft"}, "loss": {"beta": 0.1}},
        "loss: found {'name': 'sigmoid', 'beta': 0.1} with train.objective \"sft\", which has",
    ),
    (
        {"train": {"objective": "sft"}, "loss": {"name": "ipo"}},
        'loss.name: has no effect, as train.objective is "sft"; leave it out',
    ),
    (
        {"train": {"objective": "sft"}, "data": {**EVAL, "prefix_sharing": False}},
        'data.prefix_sharing: has no effect, as train.objective is "sft"',
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_FILES, ids=[m for _, m in WRONG_FILES])
def test_wrong_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, MINIMAL | change)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("beta", "loss.beta"),
        ("label_smoothing", "loss.label_smoothing"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("model.polcy", "model.policy"),
        ("model.lora.rnk", "model.lora.rank"),
        ("modle", "model"),
        ("data.train.0.pth", "data.train.0.path"),
        ("data.eval.houldout", "data.eval.holdout"),
        ("evaluation.samples.temprature", "evaluation.samples.temperature"),
        ("train.shuffle", "data.shuffle"),
        ("log.evry", "log.every"),
    ],
)
def test_unknown_keys_suggest_the_nearest(tmp_path: Path, unknown: str, nearest: str) -> None:
    override = f"{unknown}=1"
    path = write(tmp_path, {**MINIMAL, "evaluation": {"samples": {"prompts": "p"}}, "data": EVAL})
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    expected = f"{unknown}: unknown key; nearest valid key: {nearest}"
    assert str(error.value) == f"command line, {override}: {expected}"

    section, _, name = unknown.rpartition(".")
    if section in MINIMAL:
        with pytest.raises(UserError) as error:
            load_config(write(tmp_path, {**MINIMAL, section: {**MINIMAL[section], name: 1}}))
        assert str(error.value) == f"{path}: {expected}"


def test_an_unknown_key_like_no_other_lists_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.zzz: unknown key; valid keys here: model.policy, "):
        load_config(write(tmp_path, MINIMAL), ["model.zzz.rank=8"])
    with pytest.raises(
        UserError, match="log.zzz: unknown key; valid keys here: log.every, log.to, "
    ):
        load_config(write(tmp_path, {**MINIMAL, "log": {"zzz": 1}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", 'command line: found "train.seed", expected section.key=value'),
        ("=1", 'command line: found "=1", expected section.key=value'),
        ("train.seed=x", 'command line, train.seed=x: train.seed: found "x", expected an integer'),
        (
            "train.seed=NaN",
            "command line, train.seed=NaN: train.seed: found NaN, expected a finite",
        ),
        ("loss.beta=1e999", "command line, loss.beta=1e999: loss.beta: found Infinity, expected a"),
        ('log={"every": 0}', 'command line, log={"every": 0}: log.every: found 0, expected an int'),
        (
            "modle.policy=x",
            "command line, modle.policy=x: modle: unknown key; nearest valid key: m",
        ),
        ("data.train.2.path=x", "data.train.2: found [{"),
        ("data.train.path=x", "data.train.path: found [{"),
        ("output_dir.a=x", 'output_dir.a: found "o" around it, which has no such key or index'),
        (
            "optimizer.alpha=0.5",
            "command line, optimizer.alpha=0.5: optimizer.alpha: has no effect",
        ),
        # What is missing is missing from the file, whichever override opened the section.
        ("evaluation.samples.count=1", "run.json: evaluation.samples.prompts: missing, expected"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, MINIMAL), ["train.epochs=2", override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "model": {,}}',
            "not valid JSON (Expecting property name enclosed in double quotes: line 2 column 13",
        ),
        ("[1]", "found [1], expected an object of sections"),
        ('{"loss": {"beta": 1, "beta": 1}}', "loss.beta: occurs twice in one object"),
        ('{"train": {"seed": 1' + "0" * 5000 + "}}", "train.seed: found Infinity"),
        ('{"train": {"seed": 1' + "0" * 30 + "}}", "train.seed: found 1e+30"),
    ],
)
def test_wrong_json(tmp_path: Path, text: str, message: str) -> None:
    minimal = json.dumps(MINIMAL)[1:]
    text = text.replace("}}", "}, " + minimal) if text.startswith('{"') else text
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=f"^{path}: cannot read the configuration: "):
            load_config(path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(
        UserError, match="latin.json: not valid JSON .*decode byte 0x.. in position 7"
    ):
        load_config(tmp_path / "latin.json")


COUNT = st.integers(1, 2**40)
RATE = st.floats(0, 1) | st.integers(0, 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~"), min_size=1)
CURATION = st.fixed_dictionaries(
    {"rule": st.sampled_from(["mean-rating", "overall-score-fixed", "rating"])},
    optional={
        "rejected": st.sampled_from(["random", "lowest", "zephyr"]),
        "decontaminate": st.none() | st.lists(TEXT, min_size=1, max_size=2),
        "drop_sources": st.none() | st.lists(TEXT, min_size=1, max_size=2),
        "duplicates": st.sampled_from(["keep", "exact", "near"]),
    },
)
SOURCES = st.lists(
    st.fixed_dictionaries(
        {"path": TEXT},
        optional={
            "split": st.none() | TEXT,
            "weight": st.floats(1e-3, 1e3) | COUNT,
            "format": st.none() | TEXT,
            "curation": st.none() | CURATION,
        },
    ),
    min_size=1,
    max_size=3,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["beta", "gamma", "average", "section"]),
    st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
)
DATA = st.fixed_dictionaries(
    {
        "train": SOURCES,
        "eval": SOURCES
        | st.fixed_dictionaries({"holdout": COUNT}, optional={"seed": st.integers(0, 9)}),
    },
    optional={
        "leaks": st.sampled_from(["keep", "drop"]),
        "tokens_per_microbatch": COUNT,
        "system_prompt": st.none() | st.text(),
        "shuffle": st.booleans(),
        "prefix_sharing": st.booleans(),
    },
)
LORA = st.fixed_dictionaries(
    {"rank": st.integers(1, 2**20), "alpha": st.floats(1e-3, 1e3)},
    optional={
        "dropout": st.floats(0, 0.99),
        "target_modules": st.just("all-linear") | st.lists(TEXT, min_size=1, max_size=3),
        "rslora": st.booleans(),
        "merge": st.booleans(),
    },
)
OPTIMIZERS = {
    "learning_rate": RATE,
    "weight_decay": RATE,
    "eps": RATE,
    "max_grad_norm": COUNT,
}
TREES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"policy": TEXT},
            optional={"reference": st.none() | TEXT, "lora": st.none() | LORA},
        ),
        "data": st.builds(
            lambda data, more: data | more,
            DATA,
            st.sampled_from(
                [
                    {},
                    {"max_length": 2000, "max_prompt_length": 1999, "tokenization": "trl-0.7.4"},
                    {"max_length": 7, "truncation": "drop"},
                    {"max_length": 7, "truncation": "sequence", "tokenization": "clean"},
                ]
            ),
        ),
        "output_dir": TEXT,
    },
    optional={
        "loss": PARAMETERS
        | st.builds(lambda name, more: {"name": name} | more, TEXT, PARAMETERS)
        | st.builds(lambda mix: {"mix": mix}, st.lists(PARAMETERS, min_size=1, max_size=2)),
        "optimizer": st.fixed_dictionaries(
            {"name": st.just("adamw")},
            optional=OPTIMIZERS | {"betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2)},
        )
        | st.fixed_dictionaries(
            {"name": st.just("rmsprop")}, optional=OPTIMIZERS | {"alpha": st.floats(0, 0.99)}
        ),
        "schedule": st.fixed_dictionaries({}, optional={"warmup_ratio": RATE}),
        "train": st.fixed_dictionaries({}, optional={"epochs": COUNT, "max_steps": COUNT}),
        "parallel": st.fixed_dictionaries(
            {}, optional={"shard": st.none() | COUNT, "compile": st.sampled_from(["auto", True])}
        ),
        "evaluation": st.fixed_dictionaries(
            {"every": st.none() | COUNT},
            optional={"samples": st.fixed_dictionaries({"prompts": TEXT, "temperature": RATE})},
        ),
    },
)


def holds(resolved: Any, given_: Any) -> bool:
    """Whether everything given is in the resolved tree, unchanged."""
    if isinstance(given_, dict):
        return all(key in resolved and holds(resolved[key], given_[key]) for key in given_)
    if isinstance(given_, list):
        return len(given_) == len(resolved) and all(map(holds, resolved, given_))
    return resolved == given_


@settings(deadline=None, max_examples=60)  # a deadline would measure the disk
@given(TREES)
def test_a_dump_loads_as_an_equal_config(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(write(Path(folder), tree))
        resolved = to_dict(config)
        assert load_config(write(Path(folder), resolved)) == config
    assert holds(resolved, tree)


def test_evaluation_sets_have_names(tmp_path: Path) -> None:
    """And can be overridden one by one; a holdout is none of them."""
    sets = {"easy": {"path": "a.jsonl"}, "hard-2": {"path": "b.jsonl", "weight": 2}}
    path = write(tmp_path, MINIMAL | {"data": {"train": [{"path": "t"}], "eval": sets}})
    found = load_config(path, ["data.eval.easy.path=c.jsonl"]).data.eval
    assert list(found) == ["easy", "hard-2"]
    assert (found["easy"].path, found["hard-2"].weight) == ("c.jsonl", 2.0)
    again = write(tmp_path, to_dict(load_config(path)))
    assert load_config(again).data.eval_sources["hard-2"] == found["hard-2"]
    holdout = load_config(path, ['data.eval={"holdout":3}']).data
    assert holdout.eval == Holdout(holdout=3) and holdout.eval_sources == ()


def test_every_shipped_configuration_loads() -> None:
    paths = sorted((ROOT / "configs").glob("*.json"))
    assert paths
    for path in paths:
        load_config(path)


def dotted_reads(source: str) -> set[tuple[str, str]]:
    """Each (owner, attribute) read in the source: `config.data.eval` is two of them."""
    reads = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "attr", getattr(owner, "id", None))
            if name:
                reads.add((name, node.attr))
    return reads


def property_fields(cls: type) -> dict[str, set[str]]:
    """The fields that each property of a section reads, for a property stands for them."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {
        function.name: {name for owner, name in dotted_reads(ast.unparse(function))}
        for function in functions
    }


def walk_sections(cls: type, owner: str) -> Iterator[tuple[type, str]]:
    """Every dataclass below a configuration, and the name of the field that holds it."""
    yield cls, owner
    for name, hint in get_type_hints(cls).items():
        pending = [hint]
        while pending:
            part = pending.pop()
            pending.extend(get_args(part))
            if is_dataclass(part):
                yield from walk_sections(part, name)


def unread(sources: list[str]) -> set[str]:
    """The fields that no source reads, through their section, its field or a property of it.

    A read is `config.section.field`, or `name.field` where `name` is the section's name, the
    field's that holds it, or its class's in lower case (`for source in config.data.train`), or
    `settings` where its class is called so.
    """
    reads = set().union(*map(dotted_reads, sources))
    missing = set()
    for cls, owner in walk_sections(Config, "config"):
        owners = {owner, cls.__name__.lower()}
        owners |= {"settings"} if cls.__name__.endswith("Settings") else set()
        through = property_fields(cls)
        used = {name for holder, name in reads if holder in owners}
        used |= set().union(*(through[name] for name in used & through.keys()))
        missing |= {f"{cls.__name__}.{entry.name}" for entry in fields(cls)} - {
            f"{cls.__name__}.{name}" for name in used
        }
    return missing


def test_reads_are_found() -> None:
    everything = unread([])
    assert {"Config.output_dir", "Source.weight", "Samples.count", "Holdout.holdout"} < everything
    source = "config.output_dir\nfor source in config.data.train: f(source.weight)\n"
    source += "config.loss.section\nmodel = config.model\nmodel.policy\nconfig.log.every = 3\n"
    found = {"output_dir", "data", "loss", "model", "log"}
    expected = {f"Config.{name}" for name in found} | {"DataSection.train", "Source.weight"}
    expected |= {f"LossSection.{name}" for name in ("name", "mix", "options")}
    expected |= {"ModelSection.policy"}
    assert everything - unread([source]) == expected


def test_every_field_is_read() -> None:
    paths = [ROOT / "train.py", ROOT / "eval.py"]
    paths += [ROOT / f"notus/{name}.py" for name in ("models", "build", "run_folder", "start")]
    for room in ("dryrun", "card", "generate"):
        paths += (ROOT / "notus" / room).glob("*.py")
    for name in (
        "data/preferences.py",
        "data/sources.py",
        "curation/curate.py",
        "curation/command.py",
        "model/lora.py",
        "model/peft.py",
    ):
        paths.append(ROOT / "notus" / name)
    assert unread([path.read_text() for path in paths if path.exists()]) == set()


def test_an_override_may_take_the_effect_of_a_key_in_the_file(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(MINIMAL)) | {"evaluation": {"every": 7}}
    tree["data"]["eval"] = {"holdout": 5}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    config = load_config(path, ["data.eval=null", "output_dir=elsewhere"])
    assert "every" not in to_dict(config)["evaluation"]
    with pytest.raises(UserError, match="command line, evaluation.every=3.*has no effect"):
        load_config(path, ["data.eval=null", "evaluation.every=3"])
    del tree["data"]["eval"]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="config.json: evaluation.every: has no effect"):
        load_config(path, ["output_dir=elsewhere"])
