"""A served model on loopback: the OpenAI protocols over a tiny model, with the faults of real servers."""

import json
import threading

import torch
from loopback import LoopbackServer

from kick.lm import generate, load_lm
from kick.lm.spec import LMSpec


class ModelServer(LoopbackServer):
    """Answers by `lm` (a FastLM). faults: how many requests fail first, with which status. echo: log-probabilities?

    unknown: keys of a request that are refused.
    """

    def __init__(self, lm, status=503, faults=0, echo=True, body=None, unknown=(), takes_tokens=True):
        self.unknown, self.takes_tokens = set(unknown), takes_tokens
        self.lm, self.status, self.faults, self.echo, self.body = lm, status, faults, echo, body
        self.bodies, self.keys = [], set()
        self.lock = threading.Lock()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        with self.lock:  # the tiny model is asked by one thread at a time
            self.bodies.append(body)
            self.keys.add(request.headers.get("authorization"))
            status, answer = self.answer(request.path, body)
        headers = {"content-type": "application/json", "retry-after": "0"}
        text = b'{"choices": [{"te' if answer == "cut" else json.dumps(answer).encode()
        self.send(request, status, text, headers)

    def answer(self, path, body):
        if self.faults:
            self.faults -= 1
            return self.status, {"error": {"message": f"not now, holder of {self.keys}"}}
        if not self.takes_tokens and not isinstance(body.get("prompt", ""), str):
            return 400, {"detail": "prompt must be a string"}  # as FastAPI words it
        if refused := sorted(self.unknown & body.keys()):
            return 400, {"error": {"message": f"unknown: {', '.join(refused[::-1])}"}}
        if self.body is not None:
            return 200, self.body
        tokenizer = self.lm.tokenizer
        if path.endswith("/chat/completions"):
            prompt = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"])
            (text,) = generate(self.lm, [prompt], body.get("stop", []), body["max_tokens"])
            return 200, {"id": "1", "object": "chat.completion", "choices": [{"message": {"content": text}}]}
        prompt = body["prompt"]
        tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        text = tokenizer.decode(tokens)
        (more,) = generate(self.lm, [text], body.get("stop", []), body["max_tokens"])
        choice = {"index": 0, "text": more, "logprobs": None}
        if body.get("echo") and self.echo:
            with torch.inference_mode():
                logits = self.lm.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            best = [logits[place].max(0) for place in range(len(tokens) - 1)]
            values = [float(logits[place, token]) for place, token in enumerate(tokens[1:])]
            choice["logprobs"] = {
                "token_logprobs": [None, *values, -1.0],
                "top_logprobs": [None, *({f"t{int(i)}": float(v)} for v, i in best), {"x": -1.0}],
            }
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        return 200, {"id": "1", "object": "text_completion", "choices": [choice], "usage": usage}


def served(path, server, **params):
    """The LM of a checkpoint that `server` serves."""
    params = {"base_url": server.url, "models": {"dense": "tiny"}, "retries": 1, **params}
    return load_lm(LMSpec(name="server", params=params), path, "float32", "cpu")
