"""Supervised fine-tuning by train.py: transformers' cross entropy, whatever the packing and ranks.

What is compared with transformers is in float64 there, one padded batch per step, the labels of
prompts and padding masked.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from lines import write_lines

from notus.config import load_config
from notus.data.preferences import Source, load_preferences
from notus.data.tokenizer import load_tokenizer
from runs import base_config, metrics, pairs_of, pairs_of_step, run, stored, tokenized

RATE, DECAY, CLIP, STEPS, PER_STEP, SHARE = 2e-3, 0.1, 0.5, 3, 24, 0.5
VARIANTS = {
    1: {
        "plain": [],
        "small budget": ["data.tokens_per_microbatch=64"],
        "messages": ['data.train=[{{"path":"{data}/messages.jsonl"}}]'],
        "completions": ['data.train=[{{"path":"{data}/completions.jsonl"}}]'],
        "adapters": ['model.lora={{"rank":4,"alpha":8,"dropout":0.1}}'],
    },
    2: {
        "two ranks": [],
        "two ranks, small budget": [
            "data.tokens_per_microbatch=64",
            "parallel.activation_checkpointing=full",
        ],
    },
}
SAME = [name for variants in VARIANTS.values() for name in variants if name != "plain"]
SAME.remove("adapters")
ONE_STEP = ["data.eval=null", "train.max_steps=1", "optimizer.max_grad_norm=1e9"]
MIX = f'loss.mix=[{{"name":"sigmoid","weight":1}},{{"name":"sft","weight":{SHARE}}}]'
TERMS = {
    "mix": ["train.objective=dpo", MIX],
    "sigmoid": ["train.objective=dpo"],
    "sft": [],
}


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """The demo's chosen responses as conversations, and as prompts and completions."""
    folder = tmp_path_factory.mktemp("data")
    source = load_config(write(folder, base_config(demo))).data.train
    pairs = load_preferences(source, seed=42).train
    for name, row_of in (
        ("messages", lambda pair: {"messages": pair.prompt + pair.chosen}),
        ("completions", lambda pair: {"prompt": pair.prompt, "completion": pair.chosen}),
    ):
        lines = [json.dumps(row_of(pair)) + "\n" for pair in pairs]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.fixture(scope="module")
def folder(demo, data, tmp_path_factory):
    """Three steps of every variant, 24, 24 and 13 answers, evaluated; and one step of each term."""
    folder = tmp_path_factory.mktemp("sft")
    config = base_config(demo)
    config["data"]["eval"] = {"holdout": 9}
    config["optimizer"] = {"learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP}
    config["schedule"] = {"name": "constant", "warmup_ratio": 0}
    config["train"] = {"objective": "sft", "pairs_per_step": PER_STEP}
    config["evaluation"] = {"every": None}
    config["checkpoint"] = {"every": 1, "keep": STEPS}
    for ranks, variants in VARIANTS.items():
        runs = [
            [*(key.format(data=data) for key in keys), f"output_dir={output_of(folder, name)}"]
            for name, keys in variants.items()
        ]
        if ranks == 2:
            runs += [
                [*ONE_STEP, *keys, f"output_dir={output_of(folder, f'term-{name}')}"]
                for name, keys in TERMS.items()
            ]
        run(config, runs, folder, ranks)
    return folder


def output_of(folder, name):
    return folder / name.replace(",", "").replace(" ", "-")


def cross_entropy(model, pairs, indices):
    """The mean over all response tokens of the pairs, by transformers itself."""
    sequences = [[pairs.tokens[part].tolist() for part in pairs.parts(i)] for i in indices]
    size = max(len(prompt) + len(answer) for prompt, answer, _ in sequences)
    ids = torch.zeros((len(sequences), size), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer, none) in enumerate(sequences):
        assert not none
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return model(input_ids=ids, labels=labels).loss  # padding lies behind all that is scored


def open_model(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    # transformers gives the padding token's embedding no gradient, here that of "</s>" in the text.
    model.model.embed_tokens.padding_idx = None
    return model


@pytest.fixture(scope="module")
def by_hand(demo, folder):
    """The three steps written out: their metrics, the first gradient, all weights at the end."""
    pairs, held_out = pairs_of(load_config(folder / "config.json"))
    assert len(pairs) == 61 and len(held_out) == 9
    model = open_model(demo / "sft")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    with torch.no_grad():
        evaluations = [cross_entropy(model, held_out, range(9)).item()]
    lines, gradient = [], {}
    for step in range(STEPS):
        chosen = pairs_of_step(step, pairs=61, pairs_per_step=PER_STEP, seed=42, shuffle=True)
        loss = cross_entropy(model, pairs, chosen)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        gradient = gradient or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": loss.item(), "grad_norm": norm})
    with torch.no_grad():
        evaluations.append(cross_entropy(model, held_out, range(9)).item())
    end = {name: p.detach() for name, p in model.named_parameters()}
    return SimpleNamespace(
        lines=lines, evaluations=evaluations, gradient=gradient, start=start, end=end
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *SAME])
def test_steps_are_those_of_transformers(name, folder, by_hand):
    logged = [line for line in metrics(output_of(folder, name)) if "loss" in line]
    assert logged[0]["loss"] == pytest.approx(by_hand.lines[0]["loss"], rel=1e-6)
    for ours, theirs in zip(logged, by_hand.lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["grad_norm"] > CLIP  # so that clipping did something
        assert not any("reward" in key or "rejected" in key for key in ours)
    checkpoints = output_of(folder, name) / "checkpoints"
    moments = stored(checkpoints / "step-00000001", "optimizer")
    for parameter, expected in by_hand.gradient.items():
        found = moments[f"exp_avg/{parameter}"].double() / 0.1
        assert (found - expected).norm() <= 1e-5 * expected.norm(), parameter
    trained = stored(checkpoints / "step-00000003", "model")
    assert trained.keys() == by_hand.end.keys()
    for parameter, expected in by_hand.end.items():
        moved = (expected - by_hand.start[parameter]).norm()
        assert (trained[parameter] - expected).norm() <= 1e-3 * moved, parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *SAME])
def test_held_out_loss_and_perplexity(name, folder, by_hand):
    evaluated = [line for line in metrics(output_of(folder, name)) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, STEPS]
    for line, expected in zip(evaluated, by_hand.evaluations, strict=True):
        assert line["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert line["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]


@pytest.mark.slow
def test_adapters_begin_at_the_model_and_learn(folder, by_hand):
    output = output_of(folder, "adapters")
    lines = [line for line in metrics(output) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(by_hand.lines[0]["loss"], rel=1e-6)
    evaluated = [line["eval_loss"] for line in metrics(output) if "eval_loss" in line]
    assert evaluated[0] == pytest.approx(by_hand.evaluations[0], rel=1e-6)
    assert evaluated[1] < evaluated[0] - 1e-3
    trained = stored(output / "checkpoints/step-00000003", "adapter")
    assert len(trained) == 2 * 4 * 4  # two factors, four blocks, q, k, v and o
    assert all(".lora_" in name and value.any() for name, value in trained.items())
    assert (output / "final/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_mix_with_sft_has_the_weighted_sum_of_gradients(folder):
    outputs = {name: output_of(folder, f"term-{name}") for name in TERMS}
    losses = {name: metrics(output)[0]["loss"] for name, output in outputs.items()}
    assert losses["sigmoid"] == pytest.approx(math.log(2), abs=1e-6)
    expected = losses["sigmoid"] + SHARE * losses["sft"]
    assert losses["mix"] == pytest.approx(expected, rel=1e-6)
    moments = {
        name: stored(output / "checkpoints/step-00000001", "optimizer")
        for name, output in outputs.items()
    }
    keys = [key for key in moments["mix"] if key.startswith("exp_avg/")]
    assert len(keys) == 39
    for key in keys:
        sigmoid, sft = moments["sigmoid"][key], moments["sft"][key]
        expected = sigmoid + SHARE * sft
        assert (moments["mix"][key] - expected).norm() <= 1e-5 * expected.norm(), key
        assert sigmoid.norm() > 1e-3 * sft.norm(), key  # neither is lost in the other


def tokens_of(rows, demo, folder):
    """What train.py would train on: the tokens and lengths of a file of these rows."""
    source = Source(path=str(write_lines(folder / "rows.jsonl", rows)))
    found = load_preferences([source], seed=0, responses_only=True)
    assert not found.dropped, found.dropped
    return tokenized(found.train, demo / "sft")


def test_every_format_of_the_same_content_gives_the_same_tokens(demo, tmp_path):
    talk = [
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Spell cat."},
        {"role": "assistant", "content": "c-a-t"},
    ]
    other = [{"role": "assistant", "content": "no"}]
    halves = [(talk[:1], talk[1:2]), (talk[:3], talk[3:])]
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]
    formats = {
        "messages": [{"messages": talk}],
        "conversations": [{"conversations": turns}],
        "completion": [{"prompt": asked, "completion": told} for asked, told in halves],
        "preference": [{"prompt": p, "chosen": told, "rejected": other} for p, told in halves],
        "implied": [{"chosen": p + told, "rejected": p + other} for p, told in halves],
        "unpaired": [{"prompt": p, "completion": told, "label": True} for p, told in halves],
    }
    found = {name: tokens_of(rows, demo, tmp_path) for name, rows in formats.items()}
    tokenizer = load_tokenizer(demo / "sft")
    pairs = found["messages"]
    decoded = [[tokenizer.decode(pairs.tokens[part]) for part in pairs.parts(i)] for i in (0, 1)]
    first = "<|user|>\nWhat is 2 plus 3?</s>\n<|assistant|>\n"
    second = first + "5</s>\n<|user|>\nSpell cat.</s>\n<|assistant|>\n"
    assert decoded == [[first, "5</s>", ""], [second, "c-a-t</s>", ""]]
    for name, tokens in found.items():
        assert tokens.fingerprint() == pairs.fingerprint(), name
