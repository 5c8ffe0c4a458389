"""A scripted judge on loopback: the OpenAI chat protocol, with every way to fail that a real endpoint has."""

import json
import threading
import time
from collections import Counter
from contextlib import suppress

from loopback import LoopbackServer


class JudgeServer(LoopbackServer):
    """Answers with `script(prompt, attempt)`, which gives a reply's text, or one of the faults below.

    asked: how often each prompt came in; answered: how often it was answered with a text that the script calls good.
    """

    def __init__(
        self, script, usage=(100, 20), understands_schemas=True, wrong=lambda text: {"error": {"message": text}}
    ):
        """wrong: how it words what is wrong with a request."""
        self.wrong = wrong
        self.script, self.usage, self.understands_schemas = script, usage, understands_schemas
        self.asked, self.answered = Counter(), Counter()
        self.bodies, self.keys, self.azure_keys, self.paths = [], set(), set(), set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        first = body["messages"][1]["content"]
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.asked[first] += 1
            attempt = self.asked[first]
            self.bodies.append(body)
            self.keys.add(request.headers.get("authorization"))
            self.azure_keys.add(request.headers.get("api-key"))
            self.paths.add(request.path)
        try:
            if not self.understands_schemas and "response_format" in body:
                return self.send_json(request, 400, self.wrong("unknown field response_format"))
            fault = self.script(first, attempt)
            if isinstance(fault, Fault):
                return fault.happen(self, request)
            with self.lock:
                self.answered[first] += 1
            self.send_json(request, 200, self.completion(fault))
        finally:
            with self.lock:
                self.under_way -= 1

    def completion(self, text, finish_reason="stop", refusal=None):
        message = {"role": "assistant", "content": text, "refusal": refusal}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted-2026-01",
            "system_fingerprint": "fp_1",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {
                "prompt_tokens": self.usage[0],
                "completion_tokens": self.usage[1],
                "total_tokens": sum(self.usage),
            },
        }

    def send_json(self, request, status, document, headers=(), raw=None):
        data = raw if raw is not None else json.dumps(document).encode()
        self.send(request, status, data, {"content-type": "application/json", **dict(headers)})


class Fault:
    def __init__(self, happen):
        self.happen = happen


def status(code, message="no", **headers):
    """An HTTP error."""
    named = [(key.replace("_", "-"), value) for key, value in headers.items()]
    return Fault(lambda server, request: server.send_json(request, code, {"error": {"message": message}}, named))


def slow(seconds, text):
    """A reply that comes late."""

    def happen(server, request):
        time.sleep(seconds)
        with suppress(OSError):  # the client may have gone away
            server.send_json(request, 200, server.completion(text))

    return Fault(happen)


CUT = Fault(lambda server, request: request.connection.close())
NOT_JSON = Fault(lambda server, request: server.send_json(request, 200, None, raw=b'{"choices": [{"mess'))
REFUSAL = Fault(
    lambda server, request: server.send_json(request, 200, server.completion("", refusal="I will not judge that."))
)
