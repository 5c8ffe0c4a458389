"""report.html in a real browser: it sorts, filters and drills down, says nothing to the console and asks nobody."""

import os
import shutil
from pathlib import Path

import pytest
from written_run import HOSTILE, SETTINGS, write_run

from kick.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt install chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = write_run(tmp_path_factory.mktemp("page") / "run", SETTINGS, ["factoid_qa", "perplexity"])
    write_report(root)
    return root / "report.html"


@pytest.fixture
def page(browser, report):
    """The report in a window of its own; whatever goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert said == []
    assert asked == [report.as_uri()]
    context.close()


def column(page, table, name):
    heads = page.locator(f"{table} thead th").all_inner_texts()
    index = [head.strip() for head in heads].index(name)
    rows = page.locator(f"{table} tbody tr:visible")
    return [row.locator("th, td").nth(index).inner_text().strip() for row in rows.all()]


def test_tables_sort_by_a_click_and_by_the_keyboard(page):
    table = "#verdict-table"
    page.locator(f"{table} thead button", has_text="retained").click()
    found = [float(text.removesuffix(" %")) for text in column(page, table, "retained")]
    assert found == sorted(found)
    assert len(found) == 8
    assert page.locator(f"{table} th[aria-sort=ascending]").inner_text() == "retained"
    page.locator(f"{table} thead button", has_text="retained").focus()
    page.keyboard.press("Enter")
    found = [float(text.removesuffix(" %")) for text in column(page, table, "retained")]
    assert found == sorted(found, reverse=True)
    page.locator(f"{table} thead button", has_text="setting").click()
    assert column(page, table, "setting") == sorted(column(page, table, "setting"))


def test_tables_filter_by_words(page):
    box = page.locator(".filter", has=page.locator("input")).last
    box.locator("input").fill('WANDA "not matching"')
    rows = column(page, "#verdict-table", "verdict")
    assert rows
    assert set(rows) == {"not matching"}
    assert all("wanda" in name for name in column(page, "#verdict-table", "setting"))
    assert box.locator("output").inner_text() == f"{len(rows)} of 8"
    box.locator("input").fill('"matching')
    assert set(column(page, "#verdict-table", "verdict")) == {"matching"}
    box.locator("input").fill("")
    assert len(column(page, "#verdict-table", "setting")) == 8


def test_a_verdict_leads_to_the_answers_that_changed(page):
    row = page.locator("#verdict-table tbody tr", has_text="magnitude@0.5").filter(has_text="factoid_qa")
    row.locator("a").first.click()
    target = page.locator("details", has=page.locator("summary", has_text="magnitude@0.5 on factoid_qa")).first
    target.and_(page.locator("[open]")).wait_for()  # the browser tells of a new address after the click has returned
    assert "40 lost, 0 won" in target.locator("summary").first.inner_text()
    flip = target.locator(".flip").first
    assert "dense (right)" in flip.inner_text()
    assert "magnitude@0.5 (wrong)" in flip.inner_text()
    prompt = flip.locator("details")
    assert prompt.get_attribute("open") is None  # folded away
    prompt.locator("summary").click()
    assert "Why?" in prompt.locator("pre").inner_text()


def test_an_address_with_a_place_opens_it(page, report):
    page.goto(report.as_uri() + "#flips-0")
    assert page.locator("#flips-0").get_attribute("open") is not None


def test_what_models_say_stays_text(page):
    assert page.locator("script").count() == 1  # the page's own
    assert page.locator("img, iframe, object").count() == 0
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert page.locator("h1").count() == 1
    text = page.evaluate("document.body.textContent")
    for part in (HOSTILE[0], HOSTILE[1], HOSTILE[6], "\u202eright to left"):
        assert part in text


def test_figures_show_values_on_hover(page):
    titles = page.locator("figure svg circle > title").all_text_contents()
    assert any(title.startswith("magnitude@0.5: 20.6 % [") for title in titles)  # 20 of 97


def test_letters_of_figures_are_about_as_large_as_those_of_the_page(browser, tmp_path):
    """Those of many panels take the whole width; those of few are not blown up."""
    root = write_run(tmp_path / "run", SETTINGS, ["factoid_qa", "summarization"])
    write_report(root)
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((root / "report.html").as_uri())
    scales = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width"
        " / (svg.viewBox.baseVal.width * 96 / 72))"
    )
    page.close()
    assert len(scales) == 5
    assert min(scales) > 0.7
    assert max(scales) <= 1.001


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_dark_room(browser, report, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll inside themselves
    colours = page.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    lightness = [sum(int(part) for part in colour[4:-1].split(",")) for colour in colours]
    assert (lightness[0] < lightness[1]) == (scheme == "light")
    context.close()


def test_it_prints(browser, report, tmp_path):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    page.set_viewport_size({"width": 700, "height": 990})  # what a sheet of A4 has between its margins, about
    cut = page.evaluate(
        "Array.from(document.querySelectorAll('.scroll')).filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert cut == 0
    page.pdf(path=tmp_path / "report.pdf")
    assert Path(tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    context.close()
