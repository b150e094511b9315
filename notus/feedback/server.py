"""A chat server with OpenAI's interface, asked until it answers or is clearly gone."""

import os
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    InferenceTimeoutError,
    OfflineModeIsEnabled,
)

from notus.errors import UserError
from notus.feedback.rubric import Asked

KEY = "NOTUS_JUDGE_KEY"  # the environment variable with the server's key
TRIES = 7  # of one request, with pauses of BACKOFF, twice that, ... seconds between them
BACKOFF, LONGEST = 1.0, 60.0
LONGEST_ASKED_FOR = 3600.0  # seconds that a server may ask to be left in peace
LONGEST_TOKEN = 100  # characters: a longer answer was not written within max_tokens
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that may pass
NO_SCHEMA = {400, 415, 422, 501}  # statuses of a server that does not know response_format


class Reply(NamedTuple):
    """An answer's text (None: none given), why it ended, and the tokens of both sides."""

    text: str | None
    finish: str | None
    prompt_tokens: int
    completion_tokens: int


class Refused(Exception):
    """The server will not answer this one request."""


class _Client(InferenceClient):
    """Sends the schema as OpenAI, vLLM and llama.cpp read it; the client has TGI's form of it."""

    def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> Any:
        sent = request_parameters.json
        if "value" in sent.get("response_format", {}):
            schema = {"name": "answer", "schema": sent["response_format"]["value"], "strict": True}
            sent["response_format"] = {"type": "json_schema", "json_schema": schema}
        return super()._inner_post(request_parameters, stream=stream)


class Server:
    """One model of a server. `ask` may be called from several threads.

    answered: whether it has answered anything; until then a refusal is a mistake in the settings.
    has_schema: whether answers are asked for by JSON schema; False once the first answer came only
    without. stop: set to end all waiting.
    """

    def __init__(self, url: str, model: str, *, timeout: float, max_tokens: int) -> None:
        if not _is_address(url):
            raise UserError(f"--url {url}: expected http://HOST/v1, without a user or a key")
        key = os.environ.get(KEY)
        if key and not (key.isascii() and key.isprintable()):  # the client's error would show it
            raise UserError(f"{KEY}: holds a line break or another character that no key has")
        # Without a key of its own, the client would send the hub's token to the server.
        self._client = _Client(base_url=url, api_key=key or "none", timeout=timeout)
        self._url, self._model, self._has_key = url, model, bool(key)
        self._timeout, self._max_tokens = timeout, max_tokens
        self._not_before = 0.0  # the time until which the server wants to be left in peace
        self.answered, self.has_schema, self.stop = False, True, threading.Event()

    def ask(self, asked: Asked, seed: int, temperature: float) -> Reply:
        """The server's answer. Raises Refused, or UserError when it will not answer anything."""
        problem, known = "", self.answered
        for attempt in range(TRIES):
            self._wait(self._not_before - time.monotonic())
            try:
                reply = self._post(asked, seed, temperature)
                self.answered = True
                return reply
            except HfHubHTTPError as error:
                status, problem = error.response.status_code, _words(error)
                if status not in PASSING:
                    if not known and self.has_schema and status in NO_SCHEMA:
                        return self._without_schema(asked, seed, temperature, problem)
                    raise self._refusal(status, problem, known) from None
                pause = _retry_after(error.response.headers.get("retry-after"))
                if pause is not None:  # holds for all threads
                    self._not_before = max(self._not_before, time.monotonic() + pause)
            except OfflineModeIsEnabled:
                raise UserError(
                    f"--url {self._url}: HF_HUB_OFFLINE is set, and with it huggingface_hub's "
                    "client asks no server at all; unset it for the judge"
                ) from None
            except InferenceTimeoutError:
                problem = f"no answer within {self._timeout:g} seconds (--timeout)"
            except HTTPError as error:  # no connection, or one that breaks
                problem = str(error) or type(error).__name__
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                problem = f"an answer that is no chat completion ({type(error).__name__})"
            if attempt < TRIES - 1:
                self._wait(min(BACKOFF * 2**attempt, LONGEST))
        raise UserError(f"--url {self._url}: tried {TRIES} times; the last time: {problem}")

    def _post(self, asked: Asked, seed: int, temperature: float) -> Reply:
        named = {"name": "answer", "schema": asked.schema}
        found = self._client.chat_completion(
            asked.messages,
            model=self._model,
            seed=seed,
            temperature=temperature,
            max_tokens=self._max_tokens,
            response_format={"type": "json_schema", "json_schema": named}
            if self.has_schema
            else None,
        )
        choice, usage = found["choices"][0], found.get("usage") or {}
        tokens = (usage.get(f"{side}_tokens") or 0 for side in ("prompt", "completion"))
        reply = Reply(choice["message"].get("content"), choice.get("finish_reason"), *tokens)
        kinds = (str | None, str | None, int, int)
        if not all(map(isinstance, reply, kinds)):
            raise TypeError
        if len(reply.text or "") > LONGEST_TOKEN * self._max_tokens:
            raise ValueError
        return reply

    def _without_schema(self, asked: Asked, seed: int, temperature: float, problem: str) -> Reply:
        self.has_schema = False
        try:
            return self.ask(asked, seed, temperature)
        except UserError:
            self.has_schema = True
            raise

    def _refusal(self, status: int, problem: str, known: bool) -> Exception:
        if status in (401, 403):
            found = "refuses the key in" if self._has_key else "wants a key; put it in"
            return UserError(
                f"--url {self._url}: the server {found} the environment variable {KEY}"
            )
        if known:
            return Refused(f"status {status}: {problem}")
        what = f'no such path or no model "{self._model}"' if status == 404 else "refused"
        return UserError(f"--url {self._url}, --model {self._model}: {what} ({problem})")

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(seconds, 0)):
            raise UserError("stopped")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and parts.hostname is not None
    return known and "@" not in url and url.isprintable()


def _retry_after(header: str | None) -> float | None:
    """The pause that a server asks for, in seconds or until a date, at most LONGEST_ASKED_FOR."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), LONGEST_ASKED_FOR)  # 0 for nan


def _words(error: HfHubHTTPError) -> str:
    """The server's message, or else the status, on one line."""
    text = error.server_message or error.response.text or str(error)
    return " ".join(text[:2000].split())[:200]
