"""The page of `launcher report` in a real browser: nothing is fetched, nothing complains, all is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser as browsers
from tests.unit.report_runs import HOSTILE, a_run, a_sweep, write_report

pytest.importorskip("bokeh", reason="launcher[report] is not installed: no bokeh")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.installed() is None, reason="no Chromium is installed"),
]

_SEEN = """(() => {
  const found = [];
  const walk = (node) => {
    for (const child of node.querySelectorAll('*')) {
      if (child.tagName === 'CANVAS') found.push(child);
      if (child.shadowRoot) walk(child.shadowRoot);
    }
  };
  return [...document.querySelectorAll('.plot')].map((place) => {
    found.length = 0;
    walk(place);
    let colours = 0;
    for (const canvas of found) {
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      for (let i = 0; i < data.length; i += 4) {
        const [low, high] = [Math.min(data[i], data[i + 1], data[i + 2]), Math.max(data[i], data[i + 1], data[i + 2])];
        if (data[i + 3] > 100 && high - low > 60) colours += 1;
      }
    }
    const box = place.getBoundingClientRect();
    return {colours, canvases: found.length, width: box.width, right: box.right, height: box.height};
  });
})()"""
"""Of each plot: the coloured pixels of its lines, and where it is."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    one, other = a_run(folder / "runs" / "one"), a_run(folder / "runs" / "other", learning_rate=5e-4)
    hostile = a_run(folder / "runs" / "hostile", text=HOSTILE)
    return {
        "one": write_report(folder / "one.html", one.path),
        "both": write_report(folder / "both.html", one.path, other.path),
        "hostile": write_report(folder / "hostile.html", hostile.path, one.path),
        "sweep": write_report(folder / "sweep.html", a_sweep(folder / "sweep")),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    with browsers.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.mark.parametrize("name", ["one", "both", "hostile", "sweep"])
def test_it_opens_offline_and_draws(name: str, pages: dict[str, Path], browser: browsers.Browser) -> None:
    for width, dark in ((1280, False), (390, True)):
        browser.requests.clear()
        browser.complaints.clear()
        browser.open(pages[name], width, dark)
        assert browser.complaints == []
        assert [one for one in browser.requests if not one.startswith(("file://", "data:", "blob:"))] == []
        plots = browser.value(_SEEN)
        assert len(plots) >= 7 and browser.value("Number(document.documentElement.dataset.drawn)") == len(
            plots
        )
        for plot in plots:
            assert plot["canvases"] and plot["colours"] > 20, plot
            assert plot["width"] > 250 and plot["right"] <= width and plot["height"] >= 250, plot
        assert browser.value("document.documentElement.scrollWidth") <= width, (
            "the page is wider than the screen"
        )
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")


def test_a_hostile_text_is_shown_and_does_not_run(pages: dict[str, Path], browser: browsers.Browser) -> None:
    browser.open(pages["hostile"], 1280)
    assert browser.value("window.stolen === undefined")
    assert (
        browser.value("document.querySelectorAll('main script, main img, main iframe, main svg').length") == 0
    )
    shown = browser.value("document.querySelector('.sample .input').textContent")
    assert "<script>" in shown and "onerror" in shown


def test_the_policy_stops_what_would_slip_through(pages: dict[str, Path], browser: browsers.Browser) -> None:
    browser.open(pages["one"], 1280)
    browser.requests.clear()
    browser.value(
        "(() => { const one = document.createElement('div'); document.body.append(one);"
        'one.innerHTML = \'<img src="http://192.0.2.1/a" onerror="window.stolen=1">\'; '
        "const script = document.createElement('script'); script.textContent = 'window.stolen=2'; one.append(script);"
        "return new Promise((done) => setTimeout(done, 300)); })()"
    )
    assert browser.value("window.stolen === undefined")
    assert any("Content Security Policy" in one for one in browser.complaints)
    browser.complaints.clear()


def test_themes_follow_the_system_and_the_button(pages: dict[str, Path], browser: browsers.Browser) -> None:
    browser.open(pages["one"], 1280, dark=True)
    label = "Bokeh.documents[0].roots()[0].below[0].major_label_text_color"
    dark = browser.value(label)
    browser.scheme(False)
    light = browser.value(f"new Promise((done) => setTimeout(() => done({label}), 300))")
    assert light != dark
    browser.value("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert browser.value(label) == dark and browser.value("document.documentElement.dataset.theme") == "dark"


def test_it_is_used_by_keyboard(pages: dict[str, Path], browser: browsers.Browser) -> None:
    browser.open(pages["both"], 1280)
    for _ in range(60):
        browser.press("Tab")
        if browser.value("document.activeElement.matches('input[data-run]')"):
            break
    browser.press(" ")
    lines = "Bokeh.documents[0].roots()[0].renderers"
    assert browser.value(f"{lines}.filter((one) => one.name === 'run-0').every((one) => !one.visible)")
    assert browser.value(f"{lines}.filter((one) => one.name === 'run-1').every((one) => one.visible)")
    for _ in range(60):
        browser.press("Tab")
        if browser.value("document.activeElement.matches('.plot')"):
            break
    shown = "(({start, end}) => end - start)(Bokeh.documents[0].roots()[0].x_range)"
    before = browser.value(shown)
    browser.press("+")
    assert browser.value(shown) == pytest.approx(0.7 * before)
    other = "(({start, end}) => end - start)(Bokeh.documents[0].roots()[3].x_range)"
    assert browser.value(other) == pytest.approx(0.7 * before), "plots go together"
    browser.press("0")
    assert browser.value(f"new Promise((done) => setTimeout(() => done({shown}), 200))") == pytest.approx(
        before
    )
