"""What a saved figure holds besides what is drawn: values on hover, and a legend that stays where it was put."""

import re

import pytest
from matplotlib import pyplot as plt

from kick.report.figures.style import Planned, hint, hint_patch, in_style, legend, save

POINTS = [(0.0, 3.0), (10.0, 40.0), (70.0, 900.0)]


def drawn():
    figure, axes = plt.subplots()
    for x, y in POINTS:
        hint(axes, x, y, f"at {x:g} & {y:g}")  # before the axes have their scale and limits
    axes.plot(*zip(*POINTS, strict=True), marker="o", label="line")
    (bar,) = axes.bar([30.0], [20.0], label="bar")
    hint_patch(bar, "a bar of <20>")
    axes.set_yscale("log")
    axes.set_ylabel("wide enough to move the axes")
    legend(axes, 2)
    return figure, "A caption."


@pytest.fixture
def svg(tmp_path):
    with in_style():
        save(tmp_path, Planned("a figure", "A figure", drawn))
    return (tmp_path / "a figure.svg").read_text(encoding="utf-8")


def test_a_value_shows_where_its_point_is_drawn(svg):
    markers = [
        tuple(map(float, found)) for found in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    ]
    discs = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5.5"><title>(.*?)</title>', svg)
    assert [text for _, _, text in discs] == ["at 0 &amp; 3", "at 10 &amp; 40", "at 70 &amp; 900"]
    for x, y, _ in discs:
        assert any(abs(float(x) - mx) < 0.1 and abs(float(y) - my) < 0.1 for mx, my in markers), (x, y)
    assert len({x for x, _, _ in discs}) == 3


def test_a_bar_says_its_value(svg):
    assert '<g id="hint-0"><title>a bar of &lt;20&gt;</title>' in svg


def test_a_legend_stays_where_the_first_layout_put_it(tmp_path):
    places = []

    def twice():
        figure, _ = drawn()
        figure.draw_without_rendering()
        places.append(figure.axes[0].get_legend().get_window_extent().bounds)
        kept.append(figure)
        return figure, ""

    kept = []
    with in_style():
        save(tmp_path, Planned("a", "A", twice))
        found = kept[0].axes[0].get_legend()
        kept[0].draw_without_rendering()
    assert found.get_window_extent().bounds == pytest.approx(places[0], abs=0.5)
    assert isinstance(found._get_loc(), tuple)  # fixed: not searched for again
