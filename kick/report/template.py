"""Pages from templates: everything from a model is escaped, numbers are written as in the tables."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup

from kick.files import safe_name
from kick.report import tables
from kick.report.figures.style import Drawn
from kick.settings import DENSE


def script(name: str) -> dict[str, Any]:
    """The script of that name, and the hash by which a page's policy allows it and no other."""
    text = files("kick.report").joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": f"sha256-{digest}"}


def inline(figure: Drawn) -> Markup:
    """The SVG element without its XML header, so that it can stand in a page; ids made unique to the figure.

    What is in an id goes into `url(#...)`, which holds no spaces: a suite's name may.
    """
    text = figure.svg.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for before in ('id="', "url(#", 'href="#'):
        text = text.replace(before, f"{before}{identifier(figure.name)}-")
    return Markup(text)


def identifier(name: str) -> str:
    """`name` as part of an id: letters, digits, underscores and hyphens, with a digest where that changes it."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def link(name: str) -> str:
    """The address of a page that is stored as `safe_name(name)`."""
    return quote(safe_name(name))


def render(template: str, **values: Any) -> str:
    """The page of the template of that name, with the style that all pages share."""
    here = files("kick.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": tables.number, "percent": tables.percent, "bits": tables.bits}
    environment.filters["link"] = link
    style = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    source = here.joinpath(template).read_text(encoding="utf-8")
    words = {"mean_cell": tables.mean_cell, "DENSE": DENSE, "DAGGER": tables.DAGGER}
    return environment.from_string(source).render(style=style, **words, **values)
