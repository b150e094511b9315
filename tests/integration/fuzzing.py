"""Files spoilt at random, and what a command makes of them: exit code 0 or 2 and one message.

Each target is a file that a user hands to train.py or eval.py.
"""

import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

import eval as evaluate
import train
from notus.curation.marks import fingerprint
from notus.evals.published import MT_BENCH_TURNS
from notus.feedback.check import main as check
from notus.feedback.reward import main as score_responses
from notus.files import remove
from notus.look.look import main as look

SECONDS = 20  # of one command
MEMORY = 2 * 10**9  # bytes that one command may take on top of what this process holds
ROWS = 6
HUGE = "9" * 5000  # more digits than Python reads
RAW = "\0raw\0"  # stands for text that is put into the file unquoted
VALUES = [None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, 1e-320]
VALUES += [float("nan"), float("inf"), "", " ", "a", "a" * 5000, "ä", "\ud800", "\0", "\n", "../x"]
VALUES += ["/etc/passwd", "~nobody-here/x", "~", "no/such", "{{", "</s>", [], {}, [[]], [None], [1]]
VALUES += [{"a": 1}, {"": None}, [{"a": []}], [{"role": "user", "content": "x"}]]
RAWS = [
    HUGE,
    "1e999",
    "-",
    "[" * 2000 + "]" * 2000,
    "[" * 100_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
]
TEMPLATES = [
    "{{ 1 // 0 }}",
    "{{ messages[99].content }}",
    "{% if %}",
    "{{ 'a' * 1000 }}",
    "{{ x.y }}",
]
TEMPLATES += [
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ raise_exception('no\nno') }}",
    "{# ",
    "{{",
]
TEMPLATES += [
    "</s>",
    "<s>",
    "{{ eos_token }}",
    "{{ messages | tojson }}",
    "{% macro a() %}{{ a() }}",
]
TEMPLATES += [
    "{% endmacro %}{{ a() }}",
    "{{ '\\ud800' }}",
    "{{ messages[0].role.upper() }}",
    "\0",
    " ",
]
TEMPLATES += ["{{ 10 ** 400 * 1.0 }}", "{% set a = messages[0].content %}{{ a[:3] }}", "{{ none }}"]


class TooSlow(BaseException):
    """A command took longer than SECONDS."""


class Target(NamedTuple):
    """A file that is spoilt, how, and the command that reads it."""

    file: str
    spoil: Callable[[Random, bytes], bytes]
    command: Callable[[], int]


# ------------------------------------------------------------------------------------- spoiling


def places(tree: Any, place: tuple = ()) -> Iterator[tuple]:
    """The path to each value of a JSON value, except to itself."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*place, key)
        yield from places(value, (*place, key))


def spoil_bytes(rng: Random, content: bytes) -> bytes:
    kind, at = rng.randrange(6), rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return (
            content[:at] + rng.choice([b"\xff\xfe", b"\0", b"{", b'"', b",", b"\n"]) + content[at:]
        )
    if kind == 3:
        end = min(len(content), at + rng.randrange(1, 40))
        return content[:at] + content[end:]
    if kind == 4:
        return content[at:] + content[:at]
    return rng.choice(
        [b"", b"null", b"[]", b"{}", b"5", b'"x"', b"\xef\xbb\xbf{}", b"[[[]]]", b"\0" * 99]
    )


def spoil_json(rng: Random, content: bytes) -> bytes:
    """One to three values replaced, removed, renamed or repeated; now and then other damage."""
    if rng.randrange(8) == 0:
        return spoil_bytes(rng, content)
    tree, raws = json.loads(content), []
    for _ in range(rng.randrange(1, 4)):
        *inner, key = rng.choice([*places(tree)] or [(None,)])
        if key is None:
            break
        node = tree
        for name in inner:
            node = node[name]
        kind = rng.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["", "x", f"{key}s", "\ud800"])] = node.pop(key)
        elif kind == 2:
            node[key] = RAW
            raws.append(rng.choice(RAWS))
        elif kind == 3:
            node[key] = [node[key]]
        elif kind == 4 and isinstance(node[key], int | float):
            node[key] *= rng.choice([-1, 0.5, 2, 1000, 10**9])
        else:
            node[key] = deepcopy(rng.choice(VALUES))
    text = json.dumps(tree)
    for raw in raws:
        text = text.replace(json.dumps(RAW), raw, 1)
    return text.encode()


def spoil_lines(rng: Random, content: bytes) -> bytes:
    """One of the lines of JSON."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = spoil_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def spoil_template(rng: Random, content: bytes) -> bytes:
    """Pieces of templates put into one, or in place of a part of it."""
    text = content.decode()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice([0, 0, 5, 30]))
        text = text[:at] + rng.choice(TEMPLATES) + text[end:]
    return text.encode()


def spoil_safetensors(rng: Random, content: bytes) -> bytes:
    """The header's JSON, with a length that fits it, or the bytes."""
    if rng.randrange(3) == 0:
        return spoil_bytes(rng, content)
    size = int.from_bytes(content[:8], "little")
    header = spoil_json(rng, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


# -------------------------------------------------------------------------------------- targets


def write_place(demo: Path, place: Path) -> None:
    """Fill the working directory `place` with one sound file of each kind."""
    shutil.copytree(demo / "sft", place / "policy")
    settings = json.loads((place / "policy/tokenizer_config.json").read_text())
    template = settings.pop("chat_template", None)
    if template:
        (place / "policy/tokenizer_config.json").write_text(json.dumps(settings))
        (place / "policy/chat_template.jinja").write_text(template)
    weights = "model.safetensors"
    shutil.copytree(place / "policy", place / "indexed")
    names = [*json.loads((place / f"policy/{weights}").read_bytes()[8:].split(b"}}")[0] + b"}}")]
    files = {name: "model-1.safetensors" for name in names if name != "__metadata__"}
    (place / "indexed" / weights).rename(place / "indexed/model-1.safetensors")
    (place / f"indexed/{weights}.index.json").write_text(json.dumps({"weight_map": files}))
    adapter = place / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "policy"}
    about |= {"target_modules": ["q_proj"], "bias": "none", "use_rslora": False}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {f"{layer}_A.weight": torch.ones(2, 32), f"{layer}_B.weight": torch.zeros(32, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    say = [{"role": "system", "content": "s"}, {"role": "user", "content": "Say a."}]
    answers = ([{"role": "assistant", "content": text}] for text in ("a", "b"))
    chat = dict(zip(("prompt", "chosen", "rejected"), (say, *answers), strict=True))
    text = {"prompt": "Say a.", "chosen": " a", "rejected": " b", "chosen_rating": 2}
    rated = {"instruction": "p", "source": "s", "completions": []}
    for n in (1, 4):
        scores = {"helpfulness": {"Rating": str(n)}, "honesty": {"Rating": "N/A"}}
        about = {"annotations": scores, "overall_score": n, "fine-grained_score": n}
        rated["completions"].append({"response": f"answer {n}", "model": "m", **about})
    prompt = {"prompt": say, "answer": "a"}
    rows = {
        "chat": chat,
        "text": text | {"rejected_rating": 1.5},
        "rated": rated,
        "prompts": prompt,
        "responses": prompt | {"responses": ["a", "b"]},
        "pairs": text | {"policy_chosen": -1.5, "policy_rejected": -2, "chosen_score": 2},
        "marks": {"prompt": fingerprint("p"), "responses": [fingerprint("answer 1")], "note": "n"},
    }
    for name, row in rows.items():
        count = 1 if name == "marks" else ROWS
        (place / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    manifest = {"input": "rated.jsonl", "split": None, "seed": 42, "rule": "mean-rating"}
    manifest |= {"held_out": ["prompts.jsonl"], "min_margin": 1, "drop_sources": ["t"]}
    manifest |= {"duplicates": "keep", "counts": {"rows": ROWS, "pairs": ROWS, "dropped": {}}}
    (place / "curated").mkdir()
    (place / "curated/manifest.json").write_text(json.dumps(manifest))
    write_reward_model(place / "policy", place / "reward")
    config = {
        "model": {"policy": "policy", "compute_dtype": "float32", "lora": {"rank": 2, "alpha": 4}},
        "data": {
            "train": [{"path": "text.jsonl", "weight": 1, "format": "preference"}],
            "eval": {"holdout": 2},
            "max_length": 64,
            "max_prompt_length": 32,
            "tokens_per_microbatch": 256,
        },
        "loss": {"name": "sigmoid", "beta": 0.1},
        "optimizer": {"learning_rate": 1e-6, "betas": [0.9, 0.95]},
        "train": {"pairs_per_step": 2, "epochs": 1, "seed": 3},
        "parallel": {"device": "cpu", "shard": 1},
        "evaluation": {"every": 2, "samples": {"prompts": "prompts.jsonl", "count": 1}},
        "output_dir": "out",
    }
    (place / "config.json").write_text(json.dumps(config))
    annotation = {"instruction": "i", "output_2": "o", "preference": 2, "generator_1": "b"}
    annotated = [annotation | {"generator_2": "m", "output_1": str(i)} for i in range(2)]
    annotated[1]["instruction"] = "j"
    (place / "annotations.json").write_text(json.dumps(annotated))
    judged = {"model": "m", "score": 7, "judge": ["gpt-4", "single-v1"]}
    turns = [judged | {"question_id": question, "turn": turn} for question, turn in MT_BENCH_TURNS]
    (place / "judgments.jsonl").write_text("".join(f"{json.dumps(turn)}\n" for turn in turns))
    results = {
        "results": {"hellaswag": {"alias": "h", "acc_norm,none": 0.8, "acc_norm_stderr,none": 0.1}},
        "n-shot": {"hellaswag": 10},
        "group_subtasks": {"openllm": ["hellaswag"]},
        "config": {"limit": 5},
        "model_name": "m",
    }
    (place / "results.json").write_text(json.dumps(results))
    (place / "run").mkdir()
    evaluation = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 1.1}
    names = (
        f"eval_{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
    )
    evaluation |= dict.fromkeys(names, 0.5)
    lines = ({"step": step, **evaluation} for step in (0, 100, 200))
    (place / "run/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (place / "run/config.json").write_text(json.dumps(config))
    lengths = {"chosen_tokens": 3, "rejected_tokens": 4}
    record = {"set": "s", "source": "web", "right": True, "margin": 0.5, "loss": 0.4} | lengths
    pairs = ({"sha256": digit, **record} for digit in "123")
    (place / "run/eval_pairs.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in pairs))
    shutil.copytree(place / "run", place / "other")


def write_reward_model(policy: Path, folder: Path) -> None:
    """A reward model with the policy's decoder."""
    shutil.copytree(policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MistralForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = torch.ones(1, config["hidden_size"])
    save_file(tensors, folder / "model.safetensors")


def dry_run(*overrides: str) -> Callable[[], int]:
    return lambda: train.main(["config.json", *overrides, "--dry-run"])


def score(*words: str) -> Callable[[], int]:
    return lambda: evaluate.main([*words, "--json", "new/score.json"])


def made(main: Callable[[list[str]], int], *words: str) -> Callable[[], int]:
    return lambda: main([*words, "--out", "new"])


CHAT = ('data.train=[{"path": "chat.jsonl"}]', "data.eval=null", "evaluation.samples=null")
RATED = 'data.train=[{"path": "rated.jsonl", "curation": {"rule": "mean-rating"}}]'
MARKED = '{"rule": "mean-rating", "marks": "marks.jsonl"}'
TARGETS = {
    "configuration": Target("config.json", spoil_json, dry_run()),
    "rows of text": Target("text.jsonl", spoil_lines, dry_run()),
    "rows of messages": Target("chat.jsonl", spoil_lines, dry_run(*CHAT)),
    "rated rows": Target("rated.jsonl", spoil_lines, dry_run(RATED, "data.eval=null")),
    "prompts": Target("prompts.jsonl", spoil_lines, dry_run()),
    "model": Target("policy/config.json", spoil_json, dry_run()),
    "weights": Target("policy/model.safetensors", spoil_safetensors, dry_run()),
    "index": Target(
        "indexed/model.safetensors.index.json", spoil_json, dry_run("model.policy=indexed")
    ),
    "tokenizer's settings": Target("policy/tokenizer_config.json", spoil_json, dry_run(*CHAT)),
    "tokenizer": Target("policy/tokenizer.json", spoil_json, dry_run(*CHAT)),
    "template": Target("policy/chat_template.jinja", spoil_template, dry_run(*CHAT)),
    "adapter's settings": Target(
        "adapter/adapter_config.json", spoil_json, dry_run("model.policy=adapter")
    ),
    "adapter's weights": Target(
        "adapter/adapter_model.safetensors", spoil_safetensors, dry_run("model.policy=adapter")
    ),
    "AlpacaEval": Target(
        "annotations.json", spoil_json, score("score", "alpaca_eval", "annotations.json")
    ),
    "MT-Bench": Target(
        "judgments.jsonl", spoil_lines, score("score", "mt_bench", "judgments.jsonl")
    ),
    "lm_eval": Target("results.json", spoil_json, score("score", "lm_eval", "results.json")),
    "metrics": Target("run/metrics.jsonl", spoil_lines, score("compare", "run")),
    "a run's settings": Target("run/config.json", spoil_json, score("compare", "run")),
    "responses": Target("responses.jsonl", spoil_lines, made(check, "responses.jsonl")),
    "reward model": Target(
        "reward/config.json",
        spoil_json,
        made(score_responses, "responses.jsonl", "--model", "reward"),
    ),
    "marks": Target("marks.jsonl", spoil_lines, made(look, "rated.jsonl", "--curation", MARKED)),
    "scores of pairs": Target(
        "pairs.jsonl", spoil_lines, made(look, "text.jsonl", "--scores", "pairs.jsonl")
    ),
    "manifest": Target("curated/manifest.json", spoil_json, made(look, "curated")),
    "a run's pairs": Target("run/eval_pairs.jsonl", spoil_lines, score("compare", "other", "run")),
}


# ------------------------------------------------------------------------------------ the check


@contextmanager
def spoilt(target: Target, rng: Random | None) -> Iterator[None]:
    """The target's file spoilt; now and then it is gone, a folder or a link to nowhere."""
    if rng is None:
        yield
        return
    path = Path(target.file)
    content, kind = path.read_bytes(), rng.randrange(40)
    bad = target.spoil(rng, content)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("nowhere")
    elif kind > 2:
        path.write_bytes(bad)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def resident() -> tuple[int, int]:
    """The memory of this process that is in RAM, now and at its highest, in bytes."""
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM"))


def attempt(target: Target, rng: Random | None) -> int:
    """Run the command on a spoilt file in the working directory; its exit code.

    rng: None leaves the file sound. Asserts the exit code, the one message of a refusal, that
    nothing is left behind, and the highest memory in between. That is what counts for the user's
    machine; a limit on the address space would count what PyTorch reserves and never touches, and
    would turn a large allocation into an error that the command could catch.
    """

    def too_slow(number: int, frame: object) -> None:
        raise TooSlow

    said, told = io.StringIO(), io.StringIO()
    with spoilt(target, rng):
        before = set(Path().rglob("*"))
        with suppress(OSError):  # where the kernel has no such file, the highest of all time counts
            Path("/proc/self/clear_refs").write_text("5")  # the highest is now what is in use now
        held, _ = resident()
        handler = signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(SECONDS)
        try:
            with redirect_stdout(said), redirect_stderr(told):
                code = target.command()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
        taken = resident()[1] - held
        assert taken < MEMORY, f"{taken:,} bytes of memory, after: {told.getvalue()}"
        made = {path for path in Path().rglob("*") if path not in before}
        if code == 0:
            remove(Path("new"))
            made = {path for path in made if path.parts[0] != "new"}
        assert not made, made
    if code == 1:  # a dry run that says what the run would be, except for its folder
        assert "WOULD NOT START: " in said.getvalue(), told.getvalue()
        return code
    lines = told.getvalue().splitlines()
    messages = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert code in (0, 2) and len(messages) == (code == 2), (code, told.getvalue())
    for number in messages:  # the last lines: what continues a message is indented
        assert all(line.startswith("  ") for line in lines[number + 1 :]), told.getvalue()
    return code
