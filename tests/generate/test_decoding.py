"""Batches of prompts against transformers' `generate`, one prompt at a time."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers

from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError
from notus.generate.decoding import (
    Request,
    next_tokens,
    stop_tokens,
    transformers_backend,
    until_stop,
    vllm_backend,
)

CPU = torch.device("cpu")
NEW = 9
LENGTHS = (3, 41, 1, 17, 8)  # very different, so that most rows are mostly padding


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in LENGTHS]


def requests_for(prompts, temperatures):
    return [
        Request(ids, temperature, torch.Generator().manual_seed(100 + number))
        for number, (ids, temperature) in enumerate(zip(prompts, temperatures, strict=True))
    ]


def backend(folder, top_k=0, top_p=1.0):
    settings = {"max_new_tokens": NEW, "top_k": top_k, "top_p": top_p}
    return transformers_backend(
        folder, load_tokenizer(folder), device=CPU, dtype="float32", **settings
    )


def alone(folder, ids, **settings):
    """transformers' answer to one prompt without padding, up to its stop token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, **settings)
    stops = model.generation_config.eos_token_id
    return until_stop(output[0, len(ids) :].tolist(), stops if isinstance(stops, list) else [stops])


def with_stop(folder, target, token):
    """A copy of a model folder in which `token` ends an answer as well."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((target / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], token]
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


def test_a_greedy_batch_is_each_prompt_on_its_own(other, prompts):
    answers = backend(other)(requests_for(prompts, [0.0] * len(prompts)))
    assert answers == [alone(other, ids, do_sample=False) for ids in prompts]
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("top", [{"top_k": 7}, {"top_k": 9, "top_p": 0.8}])
def test_a_sampled_batch_is_each_prompt_on_its_own_after_manual_seed(other, prompts, tmp_path, top):
    """Greedy and sampled rows in one batch, some of which end before others."""
    temperatures = [0.7, 0.0, 0.1, 1.3, 0.7]
    unstopped = backend(other, **top)(requests_for(prompts, temperatures))
    stop = unstopped[0][2]
    folder = with_stop(other, tmp_path, stop)
    requests = requests_for(prompts, temperatures)
    answers = backend(folder, **top)(requests)
    lengths = [len(answer) for answer in answers]
    assert lengths[0] <= 2 and max(lengths) == NEW
    for number, (ids, temperature) in enumerate(zip(prompts, temperatures, strict=True)):
        torch.manual_seed(100 + number)
        sampling = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, **top}
        assert answers[number] == alone(folder, ids, **sampling)
        if temperature:  # the stream is where transformers' is, for a second turn
            assert torch.equal(requests[number].draws.get_state(), torch.get_rng_state())


def test_stop_tokens_are_the_tokenizer_s_and_the_folder_s(demo, tmp_path):
    tokenizer = load_tokenizer(demo / "sft")
    assert stop_tokens(demo / "sft", tokenizer) == [2]
    assert stop_tokens(with_stop(demo / "sft", tmp_path, 77), tokenizer) == [2, 77]
    assert until_stop([5, 6, 2, 7, 2], {2}) == [5, 6]
    assert until_stop([5, 6], {2}) == [5, 6]


def test_top_k_and_ended_rows():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    draws = [torch.Generator().manual_seed(seed) for seed in range(3)]
    requests = [Request([1], 5.0, generator) for generator in draws]
    before = draws[2].get_state()
    seen = torch.stack([next_tokens(logits, requests, [True, True, False], 2) for _ in range(64)])
    assert set(seen[:, :2].flatten().tolist()) == {1, 2}
    assert seen[:, 2].tolist() == [1] * 64 and torch.equal(draws[2].get_state(), before)


def test_top_p_keeps_the_most_probable_tokens_up_to_its_share():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for top_p, kept in ((0.3, {1}), (0.6, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        requests = [Request([1], 1.0, torch.Generator().manual_seed(0))]
        seen = {int(next_tokens(logits, requests, [True], 0, top_p)) for _ in range(99)}
        assert seen == kept, top_p


def test_vllm_is_asked_for_what_was_given(demo, monkeypatch):
    """A stand-in for vLLM: there is none without a GPU."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = {"dtype": "auto", "max_new_tokens": NEW, "top_k": 0, "tensor_parallel": 2}
    tokenizer = load_tokenizer(demo / "sft")
    with pytest.raises(UserError, match="--backend vllm: vllm is not installed; expected"):
        vllm_backend(demo / "sft", tokenizer, **settings)

    class LLM:
        def __init__(self, **given):
            assert given["tensor_parallel_size"] == 2 and given["model"] == str(demo / "sft")

        def generate(self, prompts, params, use_tqdm):
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=[*p["prompt_token_ids"], s.seed, 2, 9])]
                )
                for p, s in zip(prompts, params, strict=True)
            ]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    write = vllm_backend(demo / "sft", tokenizer, **settings)
    assert write(requests_for([[4, 5], [6]], [0.0, 0.7])) == [[4, 5, 100], [6, 101]]
