"""Published sets, each as two rows in its public schema."""

import math

import pytest
from sources import assistant, load, load_one, user

from notus.curation.curate import Curation
from notus.errors import UserError

RATING = {"curation": Curation(rule="rating")}


def human(text):
    return {"from": "human", "value": text}


def dialogue(*texts):
    return "".join(
        f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(texts)
    )


TURNS = [user("a"), assistant("b"), user("c")]
SAFE = {"prompt": "Q1", "response_0": "bad1", "response_1": "good1", "is_response_0_safe": True}
SAFE |= {"is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}
SAFE2 = {"prompt": "Q2", "response_0": "good2", "response_1": "bad2", "better_response_id": 0}
SAFE2 |= {"safer_response_id": 0}
# name -> (rows, options, the prompts, scores); the responses are good1 and bad1, good2 and bad2.
SETS = {
    "Intel/orca_dpo_pairs": (
        [
            {"system": "", "question": "Q1", "chosen": "good1", "rejected": "bad1"},
            {"system": "S", "question": "Q2", "chosen": "good2", "rejected": "bad2"},
        ],
        {},
        [[user("Q1")], [{"role": "system", "content": "S"}, user("Q2")]],
        (None, None),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        [
            {
                **{"system": "S", "input": f"Q{i}", "chosen": f"good{i}", "rejected": f"bad{i}"},
                **{"generations": ["x", "y"], "order": ["chosen"], "labelling_model": "gpt-4"},
                **{"labelling_prompt": [user("p")], "rating": [9.0, 8.0], "chosen_score": 9.0},
                **{"original_chosen": "x", "in_gsm8k_train": False},
            }
            for i in (1, 2)
        ],
        {},
        [[{"role": "system", "content": "S"}, user(f"Q{i}")] for i in (1, 2)],
        (None, None),
    ),
    "Alpaca (LLaMA-Factory)": (
        [
            {"instruction": "Add.", "input": "1 2", "chosen": "good1", "rejected": "bad1"},
            {"instruction": "Q2", "input": "", "chosen": "good2", "rejected": "bad2"},
        ],
        {},
        [[user("Add.\n1 2")], [user("Q2")]],
        (None, None),
    ),
    "berkeley-nest/Nectar": (
        [
            {
                "prompt": dialogue("a", "b", "c") + "\n\nAssistant: ",
                "answers": [
                    {"answer": "bad1", "model": "m", "rank": 7.0},
                    {"answer": "good1", "model": "n", "rank": 1.0},
                ],
                "turns": 2,
                "num_responses": 2,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            },
            {
                "prompt": dialogue("Q2") + "\n\nAssistant: ",
                "answers": [
                    {"answer": "good2", "model": "m", "rank": 1.0},
                    {"answer": "bad2", "model": "n", "rank": 7.0},
                ],
            },
        ],
        RATING,
        [TURNS, [user("Q2")]],
        (-1.0, -7.0),
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": (
        [
            {
                "chosen": [user(f"Q{i}"), assistant(f"good{i}")],
                "rejected": [user(f"Q{i}"), assistant(f"bad{i}")],
                "source": "magpie",
            }
            for i in (1, 2)
        ],
        {},
        [[user("Q1")], [user("Q2")]],
        (None, None),
    ),
    "nvidia/HelpSteer2": (
        [
            {
                **{"prompt": prompt, "response": response, "helpfulness": score},
                **{"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2},
            }
            for prompt, response, score in (
                ("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "bad1", 1),
                ("Q2", "good2", 4),
                ("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "good1", 4),
                ("Q2", "bad2", 1),
            )
        ],
        RATING,
        [TURNS, [user("Q2")]],
        (4.0, 1.0),
    ),
    "nvidia/HelpSteer2, preference": (
        [
            {
                **{"prompt": "Q1", "response_1": "good1", "response_2": "bad1", "split": "train"},
                **{"preference_strength": -2, "preference_statement": "It is better."},
            },
            {
                **{"prompt": "Q2", "response_1": "bad2", "response_2": "good2", "split": "train"},
                **{"preference_strength": 2, "preference_elaboration": "It is."},
            },
        ],
        {},
        [[user("Q1")], [user("Q2")]],
        (2.0, 0.0),
    ),
    "nvidia/HelpSteer3": (
        [
            {
                **{"domain": "general", "language": "english", "context": TURNS},
                **{"response1": "good1", "response2": "bad1", "overall_preference": -3},
                "individual_preference": [{"score": -3, "reasoning": "r", "feedback": "f"}],
            },
            {
                **{"context": [user("Q2")], "response1": "bad2", "response2": "good2"},
                "overall_preference": 3,
            },
        ],
        {},
        [TURNS, [user("Q2")]],
        (3.0, 0.0),
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        [SAFE, SAFE2],
        {"format": "saferlhf-better"},
        [[user("Q1")], [user("Q2")]],
        (None, None),
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": (
        [
            {
                **{"prompt_id": "x", "prompt": f"Q{i}", "all_rm_scores": [0.1, 0.9]},
                "all_generated_responses": [f"bad{i}", f"good{i}"],
                "chosen": [user(f"Q{i}"), assistant(f"good{i}")],
                "rejected": [user(f"Q{i}"), assistant(f"bad{i}")],
            }
            for i in (1, 2)
        ],
        RATING,
        [[user("Q1")], [user("Q2")]],
        (0.9, 0.1),
    ),
    "distilabel's UltraFeedback task": (
        [
            {
                **{"instruction": f"Q{i}", "generations": ["x", f"good{i}", f"bad{i}"]},
                **{"ratings": [None, 5, 2], "rationales": ["r"] * 3, "model_name": "gpt-4"},
                "distilabel_metadata": {"raw_output_ultra_feedback_0": "..."},
            }
            for i in (1, 2)
        ],
        RATING,
        [[user("Q1")], [user("Q2")]],
        (5.0, 2.0),
    ),
    "HALOs' scalar feedback": (
        [
            {
                **{"prompt": TURNS if i == 1 else [user("Q2")], "prompt_id": i, "sample_id": 0},
                **{"output": [assistant(f"{word}{i}")], "reward": reward, "generator": "m"},
                "type": "scalar_feedback",
            }
            for i in (1, 2)
            for word, reward in (("bad", 0.1), ("good", 0.9))
        ],
        RATING,
        [TURNS, [user("Q2")]],
        (0.9, 0.1),
    ),
    "HALOs' pairwise feedback": (
        [
            {
                **{"prompt": TURNS, "prompt_id": 1, "type": "pairwise_feedback", "label": 1},
                **{"output_A": [assistant("good1")], "output_B": [assistant("bad1")]},
                **{"reward_A": 0.9, "reward_B": 0.1, "reward_difference": 0.8},
            },
            {
                **{"prompt": [user("Q2")], "prompt_id": 2, "label": 0},
                **{"output_A": [assistant("bad2")], "output_B": [assistant("good2")]},
                **{"reward_A": 0.1, "reward_B": 0.9},
            },
        ],
        {},
        [TURNS, [user("Q2")]],
        (0.9, 0.1),
    ),
    "ms-swift": (
        [
            {"messages": [*TURNS, assistant("good1")], "rejected_response": "bad1"},
            {
                "messages": [user("Q2"), assistant("good2")],
                "rejected_messages": [user("Q2"), assistant("bad2")],
            },
        ],
        {},
        [TURNS, [user("Q2")]],
        (None, None),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_loads(tmp_path, name):
    rows, options, prompts, scores = SETS[name]
    found = load(tmp_path, *rows, **options)
    assert [pair.prompt for pair in found.train] == prompts
    assert [(pair.chosen, pair.rejected) for pair in found.train] == [
        ([assistant(f"good{i}")], [assistant(f"bad{i}")]) for i in (1, 2)
    ]
    assert {(pair.chosen_score, pair.rejected_score) for pair in found.train} == {scores}
    assert not found.dropped


def test_ready_pairs_of_a_scored_set_need_no_rule(tmp_path):
    rows, *_ = SETS["princeton-nlp/llama3-ultrafeedback-armorm"]
    found = load(tmp_path, *rows)
    assert [pair.chosen for pair in found.train] == [[assistant("good1")], [assistant("good2")]]


def test_saferlhf_has_two_labels_and_the_source_chooses_one(tmp_path):
    with pytest.raises(UserError, match='"saferlhf-better" or "format": "saferlhf-safer"'):
        load(tmp_path, SAFE, SAFE2)
    found = load(tmp_path, SAFE, SAFE2, format="saferlhf-safer")
    assert [pair.chosen for pair in found.train] == [[assistant("bad1")], [assistant("good2")]]
    with pytest.raises(UserError, match='"better_response_id" is a number; expected 0 or 1'):
        load(tmp_path, {**SAFE, "better_response_id": 2}, format="saferlhf-better")


def test_a_preference_of_strength_zero_is_none(tmp_path):
    rows, *_ = SETS["nvidia/HelpSteer3"]
    found = load(tmp_path, *rows, {**rows[0], "overall_preference": 0})
    assert found.dropped == {"neither response preferred": 1}
    with pytest.raises(UserError, match='"overall_preference" is text; expected a finite number'):
        load(tmp_path, {**rows[0], "overall_preference": "much"})


def test_the_rule_has_to_read_the_ratings(tmp_path):
    rows, *_ = SETS["berkeley-nest/Nectar"]
    with pytest.raises(UserError, match='give the source "curation": {"rule": "rating"}'):
        load(tmp_path, *rows)
    with pytest.raises(UserError, match='rule "mean-rating" does not read .*expected "rating"'):
        load(tmp_path, *rows, curation=Curation(rule="mean-rating"))


def test_labelled_conversations_pair_up(tmp_path):
    rows = [
        {"messages": [user("a"), assistant(text)], "label": text == "good"}
        for text in ("good", "bad")
    ]
    (pair,) = load(tmp_path, *rows).train
    assert (pair.chosen, pair.rejected) == ([assistant("good")], [assistant("bad")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "in question and query"),
        (
            {
                "question": "elsewhere",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
            },
            "complete dialogues, and the prompt's text is not in them",
        ),
    ],
)
def test_a_question_that_would_be_lost(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, row)


def test_a_later_row_without_the_question(tmp_path):
    answers = {"chosen": "c", "rejected": "d"}
    message = "in no column; found the columns prompt, chosen, rejected; expected"
    with pytest.raises(UserError, match=message):
        load(tmp_path, {"question": "a", **answers}, {"prompt": "b", **answers})


def test_a_label_may_be_a_whole_float_as_pandas_writes_it(tmp_path):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1.0}
    assert load_one(tmp_path, row, format="saferlhf-better").chosen == [assistant("b")]
    row = {"prompt": [user("q")], "output_A": [assistant("a")], "output_B": [assistant("b")]}
    assert load_one(tmp_path, row | {"label": 1.0}).chosen == [assistant("a")]


def test_a_missing_strength_prefers_neither_response(tmp_path):
    row = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": math.nan}
    with pytest.raises(UserError, match='"preference_strength" is a number; expected a finite'):
        load(tmp_path, row)


def test_a_score_that_is_nan_is_none(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": math.nan}
    pair = load_one(tmp_path, row | {"score_rejected": 2})
    assert (pair.chosen_score, pair.rejected_score) == (None, 2.0)


@pytest.mark.parametrize("score", [math.inf, -math.inf, 10**400])
def test_a_score_that_no_float_holds(tmp_path, score):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": score}
    with pytest.raises(UserError, match='"score_chosen" is a number; expected one below 1e308'):
        load(tmp_path, row | {"score_rejected": 2})
