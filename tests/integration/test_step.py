"""Three steps of train.py against a loop written out with transformers' model and torch alone."""

import math

import pytest
import torch
import transformers
from lines import read_lines, write_lines

from notus.config import load_config
from notus.data.tokenizer import load_tokenizer
from runs import base_config, metrics, pairs_of, pairs_of_step, run, stored

RATE, BETA, CLIP, STEPS = 2e-3, 0.3, 0.05, 3


def log_prob(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    log_probs = model(ids).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_probs[rows, ids[0, len(prompt) :]].sum()


def by_hand(demo, config, per_step):
    """(metrics of each step, final weights): one pair at a time, cosine schedule, clipping."""
    pairs, _ = pairs_of(config)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(demo / "sft", dtype=torch.float32)
        for _ in range(2)
    )
    # transformers gives the padding token's embedding no gradient, here that of "</s>" in the text.
    policy.model.embed_tokens.padding_idx = None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.1)
    lines = []
    for step in range(STEPS):
        chosen = pairs_of_step(
            step, pairs=len(pairs), pairs_per_step=per_step, seed=42, shuffle=True
        )
        total = 0.0
        for index in chosen:
            prompt, good, bad = (pairs.tokens[part].tolist() for part in pairs.parts(index))
            with torch.no_grad():
                base = log_prob(reference, prompt, good) - log_prob(reference, prompt, bad)
            margin = log_prob(policy, prompt, good) - log_prob(policy, prompt, bad) - base
            loss = -torch.nn.functional.logsigmoid(BETA * margin) / per_step
            loss.backward()
            total += loss.item()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters()))
        for parameter in policy.parameters():
            parameter.grad.mul_(min(1.0, CLIP / norm))
        # Two of three steps warm up; then half a cosine over the one that is left.
        rate = RATE * (0.0, 0.5, 1.0)[step]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": total, "grad_norm": norm, "learning_rate": rate})
    return lines, policy.state_dict()


def test_the_loss_of_all_lower_pairs_is_the_sum_over_its_pairs(demo, other, tmp_path):
    """One step over 8 rows of four responses: 24 pairs, read from the raw rows here."""
    rows = read_lines(demo / "preferences.jsonl")[:8]
    raw = tmp_path / "raw.jsonl"
    write_lines(raw, rows)
    settings = base_config(demo)
    curation = {"rule": "mean-rating", "rejected": "all-lower"}
    settings["data"]["train"] = [{"path": str(raw), "curation": curation}]
    settings["model"]["reference"] = str(other)
    settings["loss"] = {"beta": BETA}
    settings["train"] = {"pairs_per_step": 24, "max_steps": 1}
    settings["output_dir"] = str(tmp_path / "out")
    run(settings, [[]], tmp_path)
    tokenizer = load_tokenizer(demo / "sft")
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (demo / "sft", other)
    )
    total, count = 0.0, 0
    for row in rows:
        text = f"<|user|>\n{row['instruction']}</s>\n<|assistant|>\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        rated = {c["response"]: c["fine-grained_score"] for c in row["completions"]}
        ratios = {}
        for response in rated:
            ids = tokenizer(f"{response}</s>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                ratios[response] = log_prob(policy, prompt, ids) - log_prob(reference, prompt, ids)
        chosen = max(rated, key=rated.get)
        for response in rated:
            if response != chosen:
                margin = BETA * (ratios[chosen] - ratios[response])
                total -= torch.nn.functional.logsigmoid(margin).item()
                count += 1
    (line,) = metrics(tmp_path / "out")
    assert count == 24 and line["loss"] * count == pytest.approx(total, rel=1e-5)
    assert abs(total / count - math.log(2)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "per_step"), [(2, 16), (3, 2)])
def test_three_steps_with_clipping_decay_and_warmup(demo, tmp_path, ranks, per_step):
    """With two pairs for three ranks, one has none in any step: it idles, and says so once."""
    settings = base_config(demo)
    settings["loss"] = {"beta": BETA}
    settings["optimizer"] = {
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "max_grad_norm": CLIP,
    }
    settings["schedule"] = {"name": "cosine", "warmup_ratio": 0.5}
    settings["train"] = {"pairs_per_step": per_step, "max_steps": STEPS}
    settings["output_dir"] = str(tmp_path / "out")
    told = run(settings, [[]], tmp_path, ranks)
    idle = "a step has 2 pairs, so at least 1 of 3 ranks idle in every step"
    assert told.count(idle) == (ranks == 3)
    lines, weights = by_hand(demo, load_config(tmp_path / "config.json"), per_step)
    for ours, theirs in zip(metrics(tmp_path / "out"), lines, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-9), (ours["step"], key)
        assert ours["grad_norm"] > CLIP  # so that clipping did something
    trained = stored(tmp_path / "out/checkpoints/step-00000003", "model")
    initial = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft").state_dict()
    assert trained.keys() == weights.keys()
    for name, value in trained.items():
        moved = (weights[name] - initial[name]).norm()
        assert moved > 0
        assert (value - weights[name]).norm() <= 1e-3 * moved, name
