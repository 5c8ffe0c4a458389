"""Pages from templates: everything from a model is escaped, numbers are written as in the tables."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kick.files import safe_name
from kick.report import tables
from kick.settings import DENSE


def render(template: str, **values: Any) -> str:
    """The page of the template of that name, with the style that all pages share."""
    here = files("kick.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": tables.number, "percent": tables.percent, "bits": tables.bits}
    environment.filters["file"] = safe_name
    style = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    source = here.joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(style=style, mean_cell=tables.mean_cell, DENSE=DENSE, **values)
