"""What an endpoint of the OpenAI protocol says when it refuses."""

import json

import openai


def said(error: openai.OpenAIError) -> str:
    """The error on one line, with the endpoint's own words.

    The client repeats them only from the protocol's form of an error; FastAPI, under which many models are served, has
    one of its own.
    """
    text = str(error)
    if isinstance(error, openai.APIStatusError) and text == f"Error code: {error.status_code}":
        text += f" - {_words(error.body)}"
    return " ".join(text.split())


def _words(body: object) -> str:
    detail = body.get("detail", body) if isinstance(body, dict) else body
    faults = detail if isinstance(detail, list) else []
    if faults and all(isinstance(fault, dict) and "msg" in fault for fault in faults):
        # without the `input`, which is what was sent: a prompt may speak of anything
        return "; ".join(f"{'.'.join(map(str, fault.get('loc', ())))}: {fault['msg']}" for fault in faults)
    return detail if isinstance(detail, str) else json.dumps(detail, ensure_ascii=False)
