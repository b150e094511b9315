import pytest
import torch.distributed as dist
from odd_text import write_tokenizer
from sources import Source, text_rows, write

from notus.data.dataset import load_datasets
from notus.data.tokenization import tokenize_pairs
from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError

CLEAN = {
    "style": "clean",
    "truncation": "pair",
    "max_length": 64,
    "max_prompt_length": 32,
    "system_prompt": None,
}


def in_two_shares(items, function):
    return [function(items[: len(items) // 3]), function(items[len(items) // 3 :])]


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def rows(count, name="a", empty=0):
    """Rows whose responses begin with tokens of their own, and `empty` unusable ones."""
    found = [{"prompt": f"{name}{i}", "chosen": " good", "rejected": " bad"} for i in range(count)]
    return found + [{"prompt": "p", "chosen": "", "rejected": "bad"}] * empty


def load(tokenizer, train, evaluation=(), **options):
    settings = {"tokenization": CLEAN, "prefix_sharing": True, "tokens_per_microbatch": 64}
    settings |= {"map_over_ranks": in_two_shares, "seed": 0}
    return load_datasets(train, evaluation, tokenizer, **settings | options)


def origins(data):
    return [pair.where for pair in data.kept]


def test_training_and_evaluation_sources(zephyr, tmp_path):
    train = [Source(write(tmp_path / "train.jsonl", rows(7, empty=2)))]
    evaluation = [Source(write(tmp_path / "eval.jsonl", rows(4, "b", empty=1)))]
    assert list(load(zephyr, train)) == ["train"]
    found = load(zephyr, train, evaluation)
    assert list(found) == ["train", "eval"]
    for data, count, empty in ((found["train"], 7, 2), (found["eval"], 4, 1)):
        direct = tokenize_pairs(data.rows, zephyr, **CLEAN).pairs
        assert data.pairs.fingerprint() == direct.fingerprint() and len(data.pairs) == count
        assert data.counts == {"dropped: empty chosen response": empty}
        assert data.notes == f"; {empty} dropped: empty chosen response"
        assert data.pairs.lengths[:, 2].all()
    assert origins(found["train"]) == [f"{tmp_path / 'train.jsonl'}:{n}" for n in range(1, 8)]


def test_named_evaluation_sets(zephyr, tmp_path):
    """They are parts of one data set, of the pairs that have tokens."""
    long = text_rows(1, "x " * 99)
    train = [Source(write(tmp_path / "train.jsonl", rows(3)))]
    named = {
        "near": Source(write(tmp_path / "near.jsonl", [*long, *rows(2, "b"), *long])),
        "far": Source(write(tmp_path / "far.jsonl", [*rows(3, "c", empty=1), *long])),
    }
    dropping = CLEAN | {"truncation": "drop"}
    data = load(zephyr, train, named, tokenization=dropping)["eval"]
    assert data.sets == {"near": range(0, 2), "far": range(2, 5)}
    together = load(zephyr, train, list(named.values()), tokenization=dropping)["eval"]
    assert data.pairs.fingerprint() == together.pairs.fingerprint() and together.sets == {}
    assert data.counts == together.counts
    named["none"] = Source(write(tmp_path / "none.jsonl", long))
    with pytest.raises(UserError, match=r"data\.eval\.none: no pair is left after tokenization"):
        load(zephyr, train, named, tokenization=dropping)


def test_pairs_without_tokens_have_no_origin(zephyr, tmp_path):
    source = Source(write(tmp_path / "a.jsonl", [*rows(1), *text_rows(2, "x " * 99), *rows(1)]))
    dropping = CLEAN | {"truncation": "drop"}
    (data,) = load(zephyr, [source], tokenization=dropping).values()
    assert origins(data) == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 4)]
    assert data.counts == {"dropped: longer than max_length": 2}


def test_a_holdout_and_responses_only(zephyr, tmp_path):
    source = Source(write(tmp_path / "a.jsonl", rows(9)))
    found = load(zephyr, [source], holdout=3, responses_only=True)
    assert [len(data.pairs) for data in found.values()] == [6, 3]
    assert not any(data.pairs.lengths[:, 2].any() for data in found.values())
    other = load(zephyr, [source], holdout=3, holdout_seed=5, responses_only=True)
    assert origins(other["eval"]) != origins(found["eval"])


def test_what_cannot_be_used_is_refused(zephyr, tmp_path):
    source = Source(write(tmp_path / "a.jsonl", rows(2)))
    with pytest.raises(UserError, match=r"a.jsonl:1: the pair takes \d+ tokens, but tokens_per_m"):
        load(zephyr, [source], tokens_per_microbatch=4)
    short = CLEAN | {"truncation": "drop", "max_length": 2}
    with pytest.raises(UserError, match="a.jsonl: no pair is left .*; 2 dropped: longer than"):
        load(zephyr, [source], tokenization=short)
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        load(zephyr, [source], [Source("absent.jsonl")])
