"""Endpoints of the OpenAI protocol: URLs that may stand in a record, and what one says when it refuses."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kick.errors import ConfigError

if TYPE_CHECKING:
    import openai


def check_url(whose: str, url: str, key_env: str, query: Iterable[str] = ()) -> None:
    """Raise ConfigError unless `url` is an http(s) URL without a credential in it or in its query: records keep it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{whose} URL '{url}' is none.", "For example http://127.0.0.1:8000/v1.")
    if parts.username or parts.password or parts.query or any("key" in name.lower() for name in query):
        raise ConfigError(
            f"{whose} URL holds a credential, which would stand in the record.",
            f"The key is read from the environment variable {key_env}.",
        )


def said(error: "openai.OpenAIError") -> str:
    """The error on one line, with the endpoint's own words.

    The client repeats them only from the protocol's form of an error; FastAPI, under which many models are served, has
    one of its own.
    """
    import openai

    text = str(error)
    if isinstance(error, openai.APIStatusError) and text == f"Error code: {error.status_code}":
        text += f" - {_words(error.body)}"
    return " ".join(text.split())


def without_key(text: str, key: str) -> str:
    """What an endpoint says may hold the key that it was sent; no record may."""
    return text.replace(key, "[key]") if len(key) > 4 else text


def _words(body: object) -> str:
    detail = body.get("detail", body) if isinstance(body, dict) else body
    faults = detail if isinstance(detail, list) else []
    if faults and all(isinstance(fault, dict) and "msg" in fault for fault in faults):
        # without the `input`, which is what was sent: a prompt may speak of anything
        return "; ".join(f"{'.'.join(map(str, fault.get('loc', ())))}: {fault['msg']}" for fault in faults)
    return detail if isinstance(detail, str) else json.dumps(detail, ensure_ascii=False)
