"""The judge against a local server that answers rightly, wrongly, late, in part or not at all."""

import json
import random

import pytest
from chat_stub import ASPECTS, Raw, completion, rating_of, right, score_of, serving

from notus.curation.command import main as curate
from notus.curation.curate import Curation
from notus.data.preferences import Source, load_preferences
from notus.feedback import server as server_module
from notus.feedback.judge import main

ROWS = [
    {"prompt": f"Question {i}?", "responses": texts, "source": "flan", "generator": "sft", "id": i}
    for i, texts in enumerate((["a", "bb", "ccc"], ["dddd", "e"], ["ff", "ff", "ggg", "hhhhhhh"]))
]
DISTINCT = 3 + 2 + 3
QUESTIONS = 3 * len(ASPECTS) + DISTINCT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF", 0.002)
    monkeypatch.delenv(server_module.KEY, raising=False)


@pytest.fixture
def responses(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def judge(responses, url, out="judged", *more):
    given = [str(responses), "--url", url, "--model", "m", "--out", str(responses.parent / out)]
    return main([*given, *more])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def first_call_of(aspect, found):
    """The server's first answer about an aspect is `found`; all others are right."""
    seen = []

    def behave(call):
        if call.aspect == aspect and not seen:
            seen.append(call)
            return found(call) if callable(found) else found
        return None

    return behave


def check_ratings(rows, missing=()):
    """Every rating is the response's own; `missing`: (prompt, aspect) that must be null."""
    for row in rows:
        for one in row["completions"]:
            response = one["response"]
            assert one["annotations"].keys() == set(ASPECTS)
            for aspect, found in one["annotations"].items():
                if (row["instruction"], aspect) in missing:
                    assert found == {"Rating": None, "Rationale": None}
                else:
                    rating = str(rating_of(response, aspect))
                    assert found == {"Rating": rating, "Rationale": f"{aspect} of {response}"}
            assert (one["overall_score"], one["critique"]) == (score_of(response), f"on {response}")


def test_rows_have_the_shape_of_ultrafeedback_and_curation_reads_them(responses, tmp_path):
    with serving() as (url, calls):
        assert judge(responses, url, "judged", "--price", "2", "10") == 0
    assert len(calls) == QUESTIONS
    assert not (tmp_path / "judged.partial").exists()
    rows = rows_of(tmp_path / "judged")
    assert [row["instruction"] for row in rows] == [row["prompt"] for row in ROWS]
    assert [row["id"] for row in rows] == [0, 1, 2] and rows[0]["models"] == ["sft"] * 3
    check_ratings(rows)  # equal responses of the third row have equal ratings
    manifest = json.loads((tmp_path / "judged/manifest.json").read_text())
    assert manifest["rated"] == 9 * 5 and set(manifest["not rated"].values()) == {0}
    assert manifest["prompt_tokens"] == 100 * QUESTIONS
    assert manifest["cost"] == pytest.approx((100 * 2 + 10 * 10) * QUESTIONS / 1e6)

    orders = [
        tuple(answer["order"])
        for answer in map(json.loads, (tmp_path / "judged/answers.jsonl").read_text().splitlines())
        if answer["name"] in ASPECTS
    ]
    assert len(orders) == 12 and len(set(orders)) > 4
    assert curate([str(tmp_path / "judged"), "--out", str(tmp_path / "pairs")]) == 0
    pairs = (tmp_path / "pairs/jsonl/train.jsonl").read_text().splitlines()
    means = {t: sum(rating_of(t, a) for a in ASPECTS) / 4 for row in ROWS for t in row["responses"]}
    for pair in map(json.loads, pairs):
        assert pair["chosen_avg_rating"] == means[pair["chosen_response"]]
        assert pair["rejected_avg_rating"] == means[pair["rejected_response"]]


def test_requests_name_seed_schema_and_the_order_shown(responses):
    with serving() as (url, calls):
        assert judge(responses, url) == 0
    assert calls[0].headers["authorization"] == "Bearer none"
    for call in calls:
        assert call.body["model"] == "m" and call.body["temperature"] == 0
        kind = call.body["response_format"]
        assert kind["type"] == "json_schema" and kind["json_schema"]["strict"] is True
        assert kind["json_schema"]["schema"]["type"] == "object"
    assert len({call.body["seed"] for call in calls}) == QUESTIONS
    shown = {
        call.aspect: call.shown for call in calls if call.prompt == "Question 0?" and call.aspect
    }
    for aspect in ASPECTS:
        order = random.Random(f"0:{aspect}:Question 0?").sample(range(3), 3)
        assert shown[aspect] == [ROWS[0]["responses"][i] for i in order]


def changed(**fields):
    def content(call):
        found = right(call)
        found["ratings"][0] |= fields
        return completion(found)

    return content


BROKEN = {
    "malformed": completion('{"aspect": "honesty", "ratings": ['),
    "prose around it": lambda call: completion(f"Here it is: {json.dumps(right(call))}"),
    "outside the scale": changed(rating=6),
    "zero": changed(rating=0),
    "a number as text": changed(rating="4"),
    "half points": changed(rating=3.5),
    "true": changed(rating=True),
    "no rationale": changed(rationale=None),
    "another aspect": lambda call: completion(right(call) | {"aspect": "helpfulness"}),
    "an answer twice": changed(answer=1),
    "one too few": lambda call: completion(
        {"aspect": call.aspect, "ratings": right(call)["ratings"][1:]}
    ),
    "a refusal": completion("I'm sorry, but I can't help with that."),
    "no content": completion(None),
    "a list": completion("[1, 2]"),
    "cut off": lambda call: completion(right(call), finish="length"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unreadable_answer_is_asked_for_again_with_another_seed(responses, tmp_path, name):
    with serving(first_call_of("honesty", BROKEN[name])) as (url, calls):
        assert judge(responses, url, "judged", "--parallel", "1") == 0
    assert len(calls) == QUESTIONS + 1
    about = [c for c in calls if c.aspect == "honesty" and c.prompt == "Question 0?"]
    assert about[0].shown == about[1].shown and about[0].body["seed"] != about[1].body["seed"]
    assert [call.body["temperature"] for call in about] == [0, 0.7]
    check_ratings(rows_of(tmp_path / "judged"))


def test_what_is_never_readable_is_null_and_counted(responses, tmp_path, capsys):
    def behave(call):
        if call.aspect == "honesty" and call.prompt == "Question 1?":
            return completion("{}")
        if call.aspect == "helpfulness" and call.prompt == "Question 2?":
            return Raw(400, b'{"error": "too long"}')
        return None

    with serving(behave) as (url, calls):
        assert judge(responses, url) == 0
        assert "6 not rated" in capsys.readouterr().out
    missing = {("Question 1?", "honesty"), ("Question 2?", "helpfulness")}
    check_ratings(rows_of(tmp_path / "judged"), missing)
    manifest = json.loads((tmp_path / "judged/manifest.json").read_text())
    assert manifest["not rated"] == {
        **dict.fromkeys(ASPECTS, 0),
        "honesty": 2,
        "helpfulness": 4,
        "overall_score": 0,
    }
    assert manifest["unreadable answers"]["it is about 'None'"] == 3


def test_not_applicable_and_a_code_fence(responses, tmp_path):
    def behave(call):
        if call.aspect == "honesty":
            found = right(call)
            found["ratings"] = [entry | {"rating": "N/A"} for entry in found["ratings"]]
            return completion(f"```json\n{json.dumps(found)}\n```")
        return None

    with serving(behave) as (url, calls):
        assert judge(responses, url) == 0
    assert len(calls) == QUESTIONS
    for row in rows_of(tmp_path / "judged"):
        assert {one["annotations"]["honesty"]["Rating"] for one in row["completions"]} == {"N/A"}


HALF = json.dumps(completion("{}")).encode()[:40]
FAILING = {
    "429": Raw(429, headers={"retry-after": "0.01"}),
    "500": Raw(500, b"oh"),
    "503": Raw(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "half a stream": Raw(body=HALF, length=4000),
    "half an answer": Raw(body=HALF),
    "no completion": Raw(body=b'{"choices": []}'),
    "too slow": Raw(wait=0.5),
    "a number as content": {"choices": [{"message": {"content": 7}}]},
    "parts as content": {"choices": [{"message": {"content": [{"type": "text", "text": "{}"}]}}]},
    "counts as text": completion("{}") | {"usage": {"prompt_tokens": "5"}},
    "an endless answer": completion("x" * 1_000_000),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failure_is_tried_again_as_it_was(responses, tmp_path, name):
    behave = first_call_of("truthfulness", FAILING[name])
    with serving(behave) as (url, calls):
        assert judge(responses, url, "judged", "--timeout", "0.3", "--parallel", "1") == 0
    about = [c for c in calls if c.aspect == "truthfulness" and c.prompt == "Question 0?"]
    assert len(calls) == QUESTIONS + 1 and about[0].body == about[1].body
    check_ratings(rows_of(tmp_path / "judged"))


def test_retry_after_is_waited_for(responses, monkeypatch):
    waited = []
    monkeypatch.setattr(server_module.Server, "_wait", lambda self, s: waited.append(s))
    with serving(first_call_of("honesty", Raw(429, headers={"retry-after": "7"}))) as (url, _):
        assert judge(responses, url, "judged", "--parallel", "1") == 0
    assert any(6 < seconds <= 7 for seconds in waited)


def test_two_runs_write_the_same_bytes_whatever_the_order_of_answers(responses, tmp_path):
    def behave(call):
        return Raw(body=json.dumps(completion(right(call))).encode(), wait=0.02 * (call.number % 3))

    with serving(behave) as (url, _):
        assert judge(responses, url, "one", "--parallel", "1") == 0
        assert judge(responses, url, "two", "--parallel", "8") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one").keys() == {"train.jsonl", "answers.jsonl", "manifest.json"}


def test_a_killed_run_resumes_and_asks_nothing_twice(responses, tmp_path, capsys):
    """The server is gone after nine answers, and the last line on record is half-written."""
    with serving() as (url, _):
        assert judge(responses, url, "whole") == 0
    with serving(lambda call: Raw(503) if call.number >= 9 else None) as (url, calls):
        assert judge(responses, url, "judged", "--parallel", "2") == 2
        error = capsys.readouterr().err
        assert f"--url {url}: tried 7 times; the last time:" in error
        first = [call.body for call in calls[:9]]
    assert not (tmp_path / "judged").exists()
    record = tmp_path / "judged.partial/answers.jsonl"
    assert len(record.read_text().splitlines()) == 9
    with record.open("a") as file:
        file.write('{"row": 1, "quest')
    with serving() as (url, calls):
        assert judge(responses, url, "judged", "--seed", "1") == 2
        assert "judged.partial: was started with seed 0, now it is 1" in capsys.readouterr().err
        assert calls == [] and judge(responses, url) == 0
    assert len(calls) == QUESTIONS - 9
    assert not [call.body for call in calls if call.body in first]
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "judged")
    assert one["train.jsonl"] == two["train.jsonl"] and one["answers.jsonl"] == two["answers.jsonl"]
    assert not (tmp_path / "judged.partial").exists()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("nan", 0), ("inf", 3600), ("1e400", 3600), ("-5", 0), ("7", 7), ("soon", None), (None, None)]
    + [("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 99 Oct 2015 07:28:00 GMT", None)],
)
def test_pauses_that_servers_ask_for(header, seconds):
    assert server_module._retry_after(header) == seconds


def test_a_server_without_schemas_is_asked_without(responses, tmp_path):
    with serving(lambda call: Raw(400) if "response_format" in call.body else None) as (url, calls):
        assert judge(responses, url) == 0
    assert len(calls) == QUESTIONS + 1
    check_ratings(rows_of(tmp_path / "judged"))


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(responses, tmp_path, monkeypatch):
    monkeypatch.setenv(server_module.KEY, "sk-secret")
    with serving() as (url, calls):
        assert judge(responses, url) == 0
    assert {call.headers["authorization"] for call in calls} == {"Bearer sk-secret"}
    assert not any(b"sk-secret" in content for content in contents(tmp_path / "judged").values())


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-s\u00e9cret"])
def test_a_key_that_cannot_be_sent_is_not_shown(responses, monkeypatch, capsys, key):
    monkeypatch.setenv(server_module.KEY, key)
    assert judge(responses, "http://127.0.0.1:9/v1") == 2
    told = capsys.readouterr().err
    assert "NOTUS_JUDGE_KEY: holds a line break or" in told and "sk-" not in told


@pytest.mark.parametrize(
    "url", ["http://h:x/v1", "http://\ud800/v1", "h/v1", "http://[::1", "http://u@h"]
)
def test_an_address_that_is_none(responses, capsys, url):
    assert judge(responses, url) == 2
    assert ": expected http://HOST/v1, without" in capsys.readouterr().err
    assert not list(responses.parent.glob("judged*"))


def test_a_rubric_of_your_own(responses, tmp_path):
    rubric = {"aspects": {"brevity": {"asks": "How short is it?", "scale": [1, 3]}}}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))

    def behave(call):
        entries = [
            {"answer": n, "rationale": "", "rating": max(1, 4 - len(text))}
            for n, text in enumerate(call.shown, start=1)
        ]
        return completion({"aspect": "brevity", "ratings": entries})

    with serving(behave) as (url, calls):
        assert judge(responses, url, "judged", "--rubric", str(tmp_path / "rubric.json")) == 0
    assert len(calls) == 3
    assert "How short is it?" in calls[0].body["messages"][1]["content"]
    row = rows_of(tmp_path / "judged")[0]
    ratings = [one["annotations"]["brevity"]["Rating"] for one in row["completions"]]
    assert ratings == ["3", "2", "1"] and row["completions"][0]["overall_score"] is None


NO_SCALE = {"aspects": {"brevity": {"asks": "How short is it?"}}}
WIDE = {"aspects": {"brevity": {"asks": "How short is it?", "scale": [0, 100]}}}


@pytest.mark.parametrize(
    ("behave", "rubric", "message"),
    [
        (None, None, "tried 7 times; the last time:"),
        (Raw(401), None, "the server wants a key; put it in the environment variable NOTUS_JUDGE"),
        (Raw(404, b"no m"), None, '--model m: no such path or no model "m" (no m)'),
        (Raw(400, b"unknown model"), None, "--model m: refused (unknown model)"),
        (Raw(), NO_SCALE, "rubric.json: aspects.brevity.scale: missing, expected a list of 2"),
        (Raw(), WIDE, "aspects.brevity.scale: found [0, 100], expected two whole numbers from 1"),
        (Raw(), {"aspects": {}}, "rubric.json: aspects: found none, expected at least one"),
    ],
)
def test_mistakes_end_with_one_message_and_no_file(
    responses, tmp_path, capsys, behave, rubric, message
):
    more = []
    if rubric is not None:
        (tmp_path / "rubric.json").write_text(json.dumps(rubric))
        more = ["--rubric", str(tmp_path / "rubric.json")]
    with serving(lambda call: behave) as (url, _):
        # A port that nobody listens on any more, if the server is to be missing.
        url = "http://127.0.0.1:9/v1" if behave is None else url
        assert judge(responses, url, "judged", *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"responses.jsonl", "rubric.json"}


def test_an_offline_hub_is_named_as_the_reason(responses, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert judge(responses, "http://127.0.0.1:9/v1") == 2
    assert "HF_HUB_OFFLINE is set, and with it" in capsys.readouterr().err


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a pet."},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Another?"},
]
WRITTEN_OUT = "\n\n".join(f"## {turn['role'].title()}\n\n{turn['content']}" for turn in TURNS)


def test_a_conversation_is_written_out_and_becomes_a_pair(tmp_path):
    """A list of a single message of the user is a question like any text."""
    file = tmp_path / "responses.jsonl"
    single = [{"role": "user", "content": "Question 0?"}]
    rows = [{"prompt": prompt, "responses": ["dog", "an ox"]} for prompt in (TURNS, single)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving() as (url, calls):
        assert judge(file, url) == 0
    shown = [call.prompt for call in calls]
    assert sorted(shown) == [WRITTEN_OUT] * 6 + ["Question 0?"] * 6
    assert WRITTEN_OUT.startswith("## System\n\nBe brief.\n\n## User\n\nName a pet.\n\n## Assist")
    assert [row["instruction"] for row in rows_of(tmp_path / "judged")] == [TURNS, "Question 0?"]
    source = Source(path=str(tmp_path / "judged"), curation=Curation(rule="overall-score"))
    pair = load_preferences([source], seed=0).train[0]
    assert pair.prompt == TURNS
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("an ox", "dog")
