"""Judging by a language model behind a server with OpenAI's interface (vLLM, llama.cpp ...).

    python -m notus.feedback.judge responses.jsonl --url http://HOST/v1 --model NAME --out judged

Every response is rated on UltraFeedback's four aspects and gets a critique with an overall score;
the rows have the shape of openbmb/UltraFeedback. A key is read from NOTUS_JUDGE_KEY only. While it
runs, OUT.partial keeps every answer; the same command resumes and asks for the others only. What
cannot be read after several attempts is not rated: null, and counted.
"""

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from shutil import rmtree
from typing import Any, NamedTuple

from notus.console import run_command
from notus.curation.rows import Row
from notus.engine.log import progress
from notus.evals.options import at_least
from notus.feedback import rubric as rubrics
from notus.feedback.record import ANSWERS, Answer, Record
from notus.feedback.responses import (
    Sampled,
    hash_of_rows,
    judge_parser,
    read_responses,
    write_rated,
)
from notus.feedback.rubric import Asked, Rubric, Unreadable
from notus.feedback.server import Refused, Reply, Server

RETRY_TEMPERATURE = 0.7  # at least, when an answer is asked for again: greedy ones would repeat


class Question(NamedTuple):
    """A question about one aspect of a row's distinct responses, or about one of them.

    order: the responses as shown, as indices into the distinct ones.
    """

    row: int
    number: int
    name: str
    order: list[int]


def questions_of(row: int, sampled: Sampled, rubric: Rubric, seed: int) -> list[Question]:
    """The questions about a row; each aspect shows the responses in a random order of its own."""
    count, found = len(sampled.distinct), []
    for name in rubric.aspects:
        draws = random.Random(f"{seed}:{name}:{sampled.prompt}")
        found.append(Question(row, len(found), name, draws.sample(range(count), count)))
    for index in range(count) if rubric.overall else ():
        found.append(Question(row, len(found), "overall", [index]))
    return found


class Judge:
    """Asks a server about the responses of all rows."""

    def __init__(
        self, sampled: Sequence[Sampled], rubric: Rubric, server: Server, record: Record
    ) -> None:
        self.sampled, self.rubric, self.server, self.record = sampled, rubric, server, record

    def settle(self, question: Question, seed: int, temperature: float, attempts: int) -> None:
        """Ask until an answer can be read, at most `attempts` times, those on record included.

        Raises UserError when the server is gone.
        """
        asked = self._asked(question)
        for attempt in range(attempts):
            answer = self.record.answers.get((question.row, question.number, attempt))
            if answer is None:
                text = f"{seed}:{attempt}:{json.dumps(asked.messages)}"
                own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2
                warmth = max(temperature, RETRY_TEMPERATURE) if attempt else temperature
                try:
                    reply, refusal = self.server.ask(asked, own, warmth), None
                except Refused as error:
                    reply, refusal = Reply(None, None, 0, 0), str(error)
                problem = refusal or self._problem(question, reply)
                place = (question.row, question.number, attempt, question.name, question.order)
                sent = (own, warmth, self.server.has_schema)
                answer = Answer(*place, *sent, *reply, problem)
                self.record.add(answer)
            if answer.problem is None:
                return

    def _asked(self, question: Question) -> Asked:
        sampled = self.sampled[question.row]
        shown = [sampled.distinct[index] for index in question.order]
        if question.number < len(self.rubric.aspects):
            criterion = self.rubric.aspects[question.name]
            return rubrics.ask_aspect(question.name, criterion, sampled.prompt, shown)
        return rubrics.ask_overall(self.rubric.overall, sampled.prompt, shown[0])

    def read(self, question: Question, text: str | None) -> list[tuple[int | str, str]]:
        """The rating and the rationale of each response as shown. Raises Unreadable."""
        if question.number < len(self.rubric.aspects):
            criterion = self.rubric.aspects[question.name]
            return rubrics.read_aspect(text, question.name, criterion, len(question.order))
        return [rubrics.read_overall(text, self.rubric.overall)]

    def _problem(self, question: Question, reply: Reply) -> str | None:
        if reply.finish == "length":
            return "cut off (--max-tokens)"
        try:
            self.read(question, reply.text)
        except Unreadable as error:
            return str(error)
        return None

    def found(self, question: Question) -> dict[int, tuple[int | str, str]]:
        """The rating and the rationale of each distinct response; none if it is not rated."""
        attempt = 0
        while answer := self.record.answers.get((question.row, question.number, attempt)):
            if answer.problem is None:
                return dict(zip(question.order, self.read(question, answer.text), strict=True))
            attempt += 1
        return {}


def rated_row(sampled: Sampled, found: Sequence[tuple[Question, dict]], aspects: int) -> Row:
    """A row in the shape of openbmb/UltraFeedback; not rated is null.

    found: each question with the ratings of the distinct responses; the first are the aspects.
    """
    row, number = sampled.row, {text: i for i, text in enumerate(sampled.distinct)}
    completions = []
    for response in sampled.responses:
        index = number[response]
        completion: dict[str, Any] = {
            "model": row.get("generator"),
            "custom_system_prompt": "",
            "response": response,
            "critique": None,
            "overall_score": None,
            "annotations": {},
        }
        for question, ratings in found:
            rating, words = ratings.get(index, (None, None))
            if question.number < aspects:
                shown = None if rating is None else str(rating)
                completion["annotations"][question.name] = {"Rating": shown, "Rationale": words}
            elif question.order == [index]:
                score = None if rating is None else float(rating)
                completion |= {"critique": words, "overall_score": score}
        completions.append(completion)
    kept = {key: value for key, value in row.items() if key not in ("prompt", "responses")}
    models = [completion["model"] for completion in completions]
    return kept | {"instruction": sampled.prompt, "models": models, "completions": completions}


def judge(options: argparse.Namespace) -> str:
    """Rate the responses of a file into the new folder of --out; returns a line about it."""
    rubric = rubrics.read_rubric(options.rubric) if options.rubric else rubrics.ULTRAFEEDBACK
    sampled = read_responses(options.responses)
    settings = {
        "judge": "language model",
        "model": options.model,
        "rubric": options.rubric or "UltraFeedback's aspects",
        "rubric_sha256": hashlib.sha256(repr((rubric, rubrics.SYSTEM)).encode()).hexdigest(),
        **{key: getattr(options, key) for key in ("seed", "temperature", "max_tokens", "attempts")},
        "responses": options.responses,
        "rows_sha256": hash_of_rows(sampled),
    }
    partial_folder = options.out.with_name(f"{options.out.name}.partial")
    given = {"timeout": options.timeout, "max_tokens": options.max_tokens}
    server = Server(options.url, options.model, **given)
    record = Record(partial_folder, settings, Answer)
    judge = Judge(sampled, rubric, server, record)
    by_row = [questions_of(i, one, rubric, options.seed) for i, one in enumerate(sampled)]
    settle = partial(
        judge.settle,
        seed=options.seed,
        temperature=options.temperature,
        attempts=options.attempts,
    )
    try:
        ask_all([q for questions in by_row for q in questions], settle, judge, options.parallel)
    finally:
        record.close()
    rows = [
        rated_row(one, [(q, judge.found(q)) for q in questions], len(rubric.aspects))
        for one, questions in zip(sampled, by_row, strict=True)
    ]
    counts = count(rows, record)
    if options.price:
        each = zip(
            options.price, (counts["prompt_tokens"], counts["completion_tokens"]), strict=True
        )
        counts["cost"] = sum(price * tokens / 1e6 for price, tokens in each)
    write_rated(
        options.out, rows, settings | {"url": options.url} | counts, {ANSWERS: record.text()}
    )
    rmtree(partial_folder)
    cost = f", cost {counts['cost']:.2f}" if options.price else ""
    return (
        f"wrote {options.out}: {len(rows):,} rows, {counts['rated']:,} ratings and scores, "
        f"{sum(counts['not rated'].values()):,} not rated; {counts['answers']:,} answers of "
        f"{counts['prompt_tokens']:,} + {counts['completion_tokens']:,} tokens{cost}"
    )


def ask_all(questions: list[Question], settle: Any, judge: Judge, parallel: int) -> None:
    """Settle all questions, `parallel` at a time.

    The first that is not on record is asked by itself, so that a mistake in the settings ends the
    run before anything is written. Raises UserError when the server is gone; the answers in flight
    are waited for.
    """
    left = [q for q in questions if not judge.found(q)]
    with progress(len(left), 0, "question") as bar, ThreadPoolExecutor(parallel) as pool:
        try:
            while left and not judge.server.answered:
                settle(left.pop(0))
                bar.update()
            for future in as_completed([pool.submit(settle, question) for question in left]):
                future.result()
                bar.update()
        except BaseException:
            judge.server.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def count(rows: Sequence[Row], record: Record) -> dict[str, Any]:
    """The manifest's counts: ratings, those that are missing and why, answers and their tokens."""
    missing: Counter[str] = Counter()
    rated = 0
    for completion in (one for row in rows for one in row["completions"]):
        values = {name: found["Rating"] for name, found in completion["annotations"].items()}
        for name, value in (values | {"overall_score": completion["overall_score"]}).items():
            missing[name] += value is None
            rated += value is not None
    answers = record.answers.values()
    return {
        "rows": len(rows),
        "rated": rated,
        "not rated": dict(missing),
        "answers": len(answers),
        "unreadable answers": dict(
            sorted(Counter(a.problem for a in answers if a.problem).items())
        ),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = judge_parser("judge", "Rate sampled responses by a language model behind a server.")
    add = parser.add_argument
    add("--url", required=True, help="of the server, up to /v1; its key: NOTUS_JUDGE_KEY")
    add("--model", required=True, help="the judge's name at the server")
    add("--rubric", metavar="FILE", help="criteria in place of UltraFeedback's (docs/rounds.md)")
    add("--parallel", type=at_least(1), default=8, help="requests at a time (default: 8)")
    add("--attempts", type=at_least(1), default=3, help="of a question (default: 3)")
    add("--temperature", type=at_least(0, float), default=0.0, help="of the first (default: 0)")
    add("--max-tokens", type=at_least(1), default=2048, help="of an answer (default: 2048)")
    seconds = at_least(0.01, float, below=1e6)
    add("--timeout", type=seconds, default=120.0, help="seconds (default: 120)")
    add("--seed", type=at_least(0), default=0, help="of orders and answers (default: 0)")
    money = "per million tokens read and written, for the manifest"
    add("--price", type=at_least(0, float), nargs=2, metavar=("IN", "OUT"), help=money)
    return run_command(lambda: judge(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
