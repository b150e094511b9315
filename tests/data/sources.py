"""Sources of preference data, written to files by tests."""

from dataclasses import dataclass

from lines import write_lines

from notus.curation.curate import Curation
from notus.data.preferences import load_preferences


@dataclass(frozen=True)
class Source:
    path: str
    split: str | None = None
    weight: float = 1.0
    longest_line: int = 2**20
    format: str | None = None
    columns: dict | None = None
    ignore: tuple | None = None
    curation: Curation | None = None


MEAN_RATING = Curation(rule="mean-rating")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    return str(write_lines(path, rows))


def load(tmp_path, *rows, **options):
    source = Source(write(tmp_path / "rows.jsonl", rows), **options)
    return load_preferences([source], seed=42)


def load_one(tmp_path, row, **options):
    (pair,) = load(tmp_path, row, **options).train
    return pair


def text_rows(count, name=""):
    return [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


def prompts(pairs):
    return [pair.prompt for pair in pairs]


QUESTION, GOOD, BAD = "Why is the sky blue?", "It scatters.", "It is painted."
DIALOGUES = {
    "chosen": [user(QUESTION), assistant(GOOD)],
    "rejected": [user(QUESTION), assistant(BAD)],
}


def completion(response, rating):
    return {"response": response, "annotations": {"honesty": {"Rating": rating}}}


SINGLE_TURN = {
    "explicit": {
        "prompt": [user(QUESTION)],
        "chosen": [assistant(GOOD)],
        "rejected": [assistant(BAD)],
    },
    "implicit": DIALOGUES,
    "h4": {"prompt": QUESTION, **DIALOGUES, "messages": [], "score_chosen": 5, "score_rejected": 2},
    "argilla-cleaned": {"prompt": QUESTION, **DIALOGUES, "chosen-rating": 5, "rejected-rating": 2},
    "dpo-mix": {**DIALOGUES, "chosen_rating": 5, "rejected_rating": 2},
    "answers-only": {
        "prompt": QUESTION,
        "chosen": [assistant(GOOD)],
        "rejected": [assistant(BAD)],
    },
    "argilla": {
        "instruction": QUESTION,
        "chosen_response": GOOD,
        "rejected_response": BAD,
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 2.0,
    },
    "hh": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "ultrafeedback": {
        "instruction": QUESTION,
        "completions": [completion(BAD, "2"), completion(GOOD, "5")],
    },
    "rated": {"prompt": QUESTION, "responses": [BAD, GOOD], "ratings": [2, 5]},
}
CURATED = {"ultrafeedback": MEAN_RATING, "rated": Curation(rule="rating")}
