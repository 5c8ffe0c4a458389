"""Figures: which ones a run has, what they name, values on hover, and legends that stay where they were put."""

import json
import re
import shutil
import warnings
import xml.etree.ElementTree

import pytest
from matplotlib import pyplot as plt
from written_run import SETTINGS, write_run

from kick import cli
from kick.files import safe_name
from kick.report import read_results, write_report
from kick.report.figures.style import Planned, hint, hint_patch, in_style, label_lines, legend, save
from kick.settings import variation_in_words
from kick.suite import Sample


def test_figures_are_drawn_with_their_axes_named(run):
    for name in ("factoid_qa-against-sparsity", "perplexity-against-sparsity", "size-against-retained"):
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (run / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        xml.etree.ElementTree.fromstring(text)
        assert {"95 % of dense", "magnitude", "wanda"} <= set(_texts(text))
    text = (run / "figures" / "factoid_qa-against-sparsity.svg").read_text(encoding="utf-8")
    assert {"sparsity of the blocks' weights, measured (%)", "contains (%)", "dense", "2:4"} <= set(_texts(text))


def _texts(svg):
    return [element.text for element in xml.etree.ElementTree.fromstring(svg).iter() if element.text]


def test_a_label_may_hold_anything(tmp_path):
    root = write_run(tmp_path / "run", [("dense", 0.0), ("magnitude@0.2", 0.2)], ["factoid_qa"])
    document = json.loads((root / "run.json").read_text())
    document["settings"][1]["label"] = "costs $5 _{ and $"
    shutil.move(root / "evaluations" / "magnitude@0.2", root / "evaluations" / safe_name("costs $5 _{ and $"))
    (root / "run.json").write_text(json.dumps(document))
    write_report(root)
    assert "costs $5 _{ and $" in (root / "figures" / "factoid_qa-flips.svg").read_text(encoding="utf-8")


def test_figures_are_listed_and_chosen(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--figures"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [
        "perplexity-against-capability", "size-against-retained", "factoid_qa-against-sparsity",
        "perplexity-against-sparsity", "factoid_qa-flips",
    ]  # fmt: skip
    assert cli.main(["report", str(run), "--out", str(tmp_path), "--figures", "size-*,factoid_qa-flips"]) == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("size-against-retained", "factoid_qa-flips") for kind in ("svg", "png", "pdf")
    }
    capsys.readouterr()
    page = (run / "report.html").read_bytes()
    (run / "figures" / "size-against-retained.svg").unlink()
    assert cli.main(["report", str(run), "--figures", "size-*"]) == 0
    assert capsys.readouterr().out == f"{run}/figures/size-against-retained.svg\n"
    assert (run / "figures" / "size-against-retained.svg").is_file()
    assert (run / "report.html").read_bytes() == page  # which shows all of them
    assert cli.main(["report", str(run), "--figures", "size-*", "--lm-eval", str(tmp_path)]) == 2
    capsys.readouterr()
    assert cli.main(["report", str(run), "--out", str(tmp_path), "--figures", "nothing"]) == 2
    assert "This run has: perplexity-against-capability" in capsys.readouterr().err


def test_figures_alone_are_drawn_with_the_margin_that_was_given(run, monkeypatch):
    from kick.report import figures

    margins, choose = [], figures.choose

    def note(results, *more):
        margins.append(results.perplexity_margin)
        return choose(results, *more)

    monkeypatch.setattr(figures, "choose", note)
    asked = ["report", str(run), "--figures", "perplexity-against-capability", "--perplexity-margin", "0.3"]
    assert cli.main(asked) == 0
    assert margins == [0.3]


def test_a_method_without_an_answer_yet_has_no_figure(tmp_path):
    failing = {("rtn@4", "factoid_qa"), ("wanda@0.1", "factoid_qa")}
    root = write_run(tmp_path / "run", [*SETTINGS[:4], ("rtn@4", 0.0)], ["factoid_qa"], failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(root)
    assert not (root / "figures" / "factoid_qa-against-bits.svg").exists()
    names = _texts((root / "figures" / "factoid_qa-against-sparsity.svg").read_text(encoding="utf-8"))
    assert "magnitude" in names
    assert "wanda" not in names


def test_groups_on_which_dense_knows_nothing_are_counted_not_drawn(tmp_path, monkeypatch):
    def samples(setting, suite):
        for index in range(60):
            right = float(index % 3 < 2 and index < 40)  # of three subjects dense knows two
            scores = {"contains": right, "exact_match": right, "f1": right}
            yield Sample(f"q{index:02d}", ("law", "art", "logic")[index % 3], "Why?", output="So.", scores=scores)

    monkeypatch.setattr("written_run.samples", samples)
    root = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa"])
    write_report(root)
    names = _texts((root / "figures" / "factoid_qa-by-group.svg").read_text(encoding="utf-8"))
    assert {"law (20)", "art (20)"} <= set(names)
    assert "logic (20)" not in names
    assert "Not here: 1 of 3, on which" in (root / "report.html").read_text(encoding="utf-8")
    alone = write_run(tmp_path / "alone", SETTINGS[:1], ["factoid_qa"])
    write_report(alone)
    assert not (alone / "figures" / "factoid_qa-by-group.svg").exists()  # nothing is compressed: an empty map


def varied(root, rows):
    """Set (compressor, variation) for the settings after dense, each called by its value."""
    document = json.loads((root / "run.json").read_text())
    for (compressor, variation), row in zip(rows, document["settings"][1:], strict=True):
        label = f"{compressor}@0.5 {variation_in_words(variation)}"
        row |= {"compressor": compressor, "level": "0.5", "label": label, "variation": variation}
        shutil.move(root / "evaluations" / row["name"], root / "evaluations" / safe_name(label))
    (root / "run.json").write_text(json.dumps(document))


def test_a_parameter_that_is_a_list_may_vary(tmp_path):
    root = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa"])
    varied(root, [("wanda", {"ignore": ["a"]}), ("wanda", {"ignore": ["b"]})])
    write_report(root)
    assert "['a']" in (root / "figures" / "factoid_qa-over-ignore.svg").read_text(encoding="utf-8")


def test_figures_of_one_name_are_files_of_their_own(tmp_path):
    settings = [*SETTINGS[:3], ("wanda@0.1", 0.1), ("wanda@2:4", 0.5)]
    root = write_run(tmp_path / "run", settings, ["factoid_qa"])
    keys = ["samples", "samples", "calibration.samples", "calibration.samples"]
    names = ["llm_pruner", "llm_pruner", "wanda", "wanda"]
    varied(root, [(name, {key: n}) for name, key, n in zip(names, keys, (8, 64, 8, 64), strict=True)])
    write_report(root)
    first, second = (
        (root / "figures" / f"factoid_qa-over-samples{more}.svg").read_text(encoding="utf-8") for more in ("", "-2")
    )
    assert "llm_pruner@0.5" in first
    assert "wanda@0.5" not in first
    assert "wanda@0.5" in second


def test_a_figure_that_cannot_be_drawn_costs_no_other(tmp_path, monkeypatch, capsys):
    from kick.report.figures import answers

    def fail(results, suite):
        raise ValueError("nothing to draw")

    monkeypatch.setattr(answers, "_flips", fail)
    root = write_run(tmp_path / "run", SETTINGS, ["factoid_qa"])
    write_report(root)
    assert "the figure factoid_qa-flips is not drawn: ValueError: nothing to draw" in capsys.readouterr().err
    assert (root / "report.html").is_file()
    assert (root / "figures" / "factoid_qa-against-sparsity.svg").is_file()


def test_what_no_other_model_beats_in_size_and_score():
    from kick.report.figures.retained import front

    assert front([(3, 9), (1, 5), (2, 4), (3, 7), (4, 9)]) == [(1, 5), (3, 9)]


def test_a_varied_parameter_has_a_figure_of_its_own(tmp_path):
    settings = [("dense", 0.0), ("magnitude@0.2", 0.2), ("magnitude@0.5", 0.5)]
    root = write_run(tmp_path / "run", settings, ["factoid_qa", "perplexity"])
    document = json.loads((root / "run.json").read_text())
    for samples, row in zip((8, 64), document["settings"][1:], strict=True):
        label = f"wanda@0.5 samples={samples}"
        row |= {"compressor": "wanda", "level": "0.5", "label": label, "variation": {"calibration.samples": samples}}
        shutil.move(root / "evaluations" / row["name"], root / "evaluations" / label)
    (root / "run.json").write_text(json.dumps(document))
    write_report(root)
    svg = (root / "figures" / "factoid_qa-over-samples.svg").read_text(encoding="utf-8")
    assert "samples of calibration" in svg
    logarithmic = (root / "figures" / "perplexity-over-samples.svg").read_text(encoding="utf-8")
    assert "mathdefault" not in logarithmic  # what matplotlib writes there by itself is not drawn as a formula
    assert "wanda@0.5" in svg
    assert "wanda@0.5 samples=64: 0.2062 [" in svg  # 20 of 97, on hover
    assert not (root / "figures" / "factoid_qa-against-sparsity.svg").exists()  # two points at one level are no curve


def test_suites_that_differ_in_one_parameter_are_drawn_together(tmp_path):
    root = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa", "facts"])
    document = json.loads((root / "run.json").read_text())
    document["config"]["suites"][1] |= {"suite": "factoid_qa", "label": "facts"}
    for name, shots in (("factoid_qa", 0), ("facts", 5)):
        document["suites"][name] |= {"suite": "factoid_qa", "params": {"shots": shots, "max_new_tokens": 8}}
    (root / "run.json").write_text(json.dumps(document))
    write_report(root)
    svg = (root / "figures" / "factoid_qa-by-shots.svg").read_text(encoding="utf-8")
    assert "magnitude@0.5" in svg


def test_of_two_varied_parameters_each_figure_says_what_is_fixed(tmp_path):
    names = ["factoid_qa", "b", "c", "d"]
    root = write_run(tmp_path / "run", SETTINGS[:2], names)
    document = json.loads((root / "run.json").read_text())
    for name, spec, shots, tokens in zip(
        names, document["config"]["suites"], (0, 0, 5, 5), (8, 16, 8, 16), strict=True
    ):
        spec |= {"suite": "factoid_qa", "label": name}
        params = {"shots": shots, "max_new_tokens": tokens}
        document["suites"][name] |= {"suite": "factoid_qa", "params": params}
    (root / "run.json").write_text(json.dumps(document))
    from kick.report.figures import planned

    assert [figure.name for figure in planned(read_results(root)) if "-by-" in figure.name] == [
        "factoid_qa-by-max_new_tokens-with-shots=0", "factoid_qa-by-max_new_tokens-with-shots=5",
        "factoid_qa-by-shots-with-max_new_tokens=8", "factoid_qa-by-shots-with-max_new_tokens=16",
    ]  # fmt: skip


def test_what_is_the_same_for_all_settings_describes_none_of_them(tmp_path):
    root = write_run(tmp_path / "run", SETTINGS[:3], ["summarization"])
    write_report(root)
    texts = _texts((root / "figures" / "summarization-answers.svg").read_text(encoding="utf-8"))
    assert {"words", "compression", "copied 4grams", "novel 2grams", "repetition"} <= set(texts)
    assert not {"empty", "over limit"} & set(texts)


# One figure

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


def test_names_of_lines_do_not_cover_each_other():
    """Three lines within a point of each other, and one far away, on an axis of 100 points height."""
    figure, axes = plt.subplots(figsize=(2, 100 / 72), dpi=72)
    axes.set_position((0, 0, 1, 1))
    axes.set_ylim(0, 100)
    label_lines(axes, {"dense": 50.0, "95 % of dense": 49.5, "chance": 49.0, "alone": 90.0})
    heights = {text.get_text(): text.xy[1] + text.xyann[1] for text in axes.texts}
    plt.close(figure)
    assert heights == pytest.approx({"chance": 40.5, "95 % of dense": 49.5, "dense": 58.5, "alone": 90.0})
