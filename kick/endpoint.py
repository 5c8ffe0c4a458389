"""What an endpoint of the OpenAI protocol says when it refuses."""

import json

import openai


def said(error: openai.OpenAIError) -> str:
    """The error on one line, with the endpoint's own words.

    The client repeats them only from the protocol's form of an error; FastAPI, under which many models are served, has
    one of its own.
    """
    text = str(error)
    body = getattr(error, "body", None)
    if body and isinstance(error, openai.APIStatusError) and text == f"Error code: {error.status_code}":
        text += f" - {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}"
    return " ".join(text.split())
