"""A chat server with OpenAI's interface whose answers a test decides."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


class Call:
    """A request as the server sees it."""

    def __init__(self, body, headers, number):
        self.body, self.headers, self.number = body, headers, number
        text = body["messages"][1]["content"]
        found = re.search("# Criterion: (.*)", text)
        self.aspect = found and found[1]
        middle = text.split("\n\n# Your reply\n\n")[0]
        heading = r"# The (?:user's message|conversation whose last message is answered)\n\n"
        self.prompt = re.split(heading, middle)[1].split("\n\n# ")[0]
        self.shown = re.split(r"\n\n# (?:Answer \d+|The answer)\n\n", middle)[1:]


def rating_of(response, aspect):
    """The true rating of a response, from 1 to 5, in these tests."""
    return 1 + (len(response) + len(aspect)) % 5


def score_of(response):
    return 1 + len(response) % 10


def right(call):
    """The content that answers a call rightly."""
    if call.aspect is None:
        response = call.shown[0]
        return {"critique": f"on {response}", "overall_score": score_of(response)}
    entries = [
        {
            "answer": n,
            "rationale": f"{call.aspect} of {text}",
            "rating": rating_of(text, call.aspect),
        }
        for n, text in enumerate(call.shown, start=1)
    ]
    return {"aspect": call.aspect, "ratings": entries[::-1]}  # the order of entries means nothing


def completion(content, finish="stop"):
    """A chat completion with this content, an object or text."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


class Raw:
    """A response other than status 200 with JSON.

    length: the content-length that is announced. wait: seconds until the response.
    """

    def __init__(self, status=200, body=b"{}", headers=(), length=None, wait=0.0):
        self.status, self.body, self.headers = status, body, dict(headers)
        self.length, self.wait = length, wait


@contextmanager
def serving(behave=lambda call: None):
    """Yield (url, calls). behave: from a Call to a completion, a Raw, or None for the right one."""
    calls, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                call = Call(body, self.headers, len(calls))
                calls.append(call)
            found = behave(call)
            found = completion(right(call)) if found is None else found
            if not isinstance(found, Raw):
                found = Raw(body=json.dumps(found).encode())
            time.sleep(found.wait)
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(found.length or len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)

        def handle(self):
            try:
                super().handle()
            except ConnectionError:  # the client has left
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", calls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
