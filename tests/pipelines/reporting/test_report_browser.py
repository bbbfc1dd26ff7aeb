"""A report opened in headless Chromium: it plays, it reads, and it asks for nothing.

Chromium comes from the system, `apt install chromium` on Debian: Playwright only drives it. Where
there is none, these tests are skipped.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

from pipelines.reporting.page import write_report
from tests.helpers.runs import finish_run, start_run, write_alarms

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
MAX_PAGE_BYTES = 15 * 2**20
SIZE = {"width": 1280, "height": 800}
# WCAG 2.2: text of normal size, and graphics.
MIN_TEXT_CONTRAST, MIN_LINE_CONTRAST = 4.5, 3.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: `apt install chromium` (or `make browser`) brings it",
    ),
]

# Contrast of every text and curve with what is painted behind it, as WCAG computes it.
CONTRASTS = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (a, b) => {
    const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = [], lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const words = walker.currentNode.data.trim();
    if (!words || !element.checkVisibility() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    texts.push([words.slice(0, 40), contrast(parse(ink), behind(element))]);
  }
  for (const line of document.querySelectorAll("svg .line, svg .mark line, svg .own")) {
    if (!line.checkVisibility()) continue;
    const style = getComputedStyle(line);
    const ink = style.stroke === "none" ? style.fill : style.stroke;
    lines.push([line.getAttribute("class"), contrast(parse(ink), behind(line))]);
  }
  return { texts, lines };
}
"""


@dataclass(slots=True)
class Visit:
    """A page that is open, and what it did.

    Attributes:
        page: The page.
        messages: Errors and warnings in its console, and exceptions.
        requests: Whatever it asked for besides its own file and data inside it.
    """

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The page of a finished run with an alarm."""
    folder = finish_run(tmp_path_factory.mktemp("single") / "demo")
    write_alarms(folder, {"iteration": 30, "name": "drift", "value": 2, "limit": 1})
    return write_report([folder])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """The page of two finished runs and one that has just begun."""
    root = tmp_path_factory.mktemp("several")
    runs = [
        finish_run(root / "a"),
        finish_run(
            root / "b", name="other", overrides=("objective.lambda_nr=0.05",), generator_seed=2
        ),
        start_run(root / "c", 3, name="young"),
    ]
    return write_report(runs)


@pytest.fixture(scope="module", params=["single", "comparison"])
def report(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def opened(browser, report) -> Iterator[Visit]:
    """One visit for many tests: loading a page costs more than all that they look at."""
    visited = visit(browser, report)
    yield visited
    visited.page.context.close()


@pytest.fixture
def page(opened) -> Page:
    """The page that is open, as it was when it was loaded."""
    opened.page.set_viewport_size(SIZE)
    opened.page.emulate_media(color_scheme="light")
    opened.page.mouse.move(0, 0)
    opened.page.evaluate(
        """() => {
          document.querySelectorAll("details").forEach((one) => { one.open = false; });
          scrollTo(0, 0);
        }"""
    )
    return opened.page


def visit(browser: Browser, report: Path, *, motion: str = "no-preference") -> Visit:
    """Opens a page; requests that would leave the file are recorded and blocked."""
    context = browser.new_context(viewport=SIZE, color_scheme="light", reduced_motion=motion)
    visited = Visit(context.new_page())

    def answer(route: Route) -> None:
        if route.request.url == report.as_uri():
            route.continue_()
        else:
            visited.requests.append(route.request.url[:100])
            route.abort()

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            visited.messages.append(message.text)

    context.route(lambda url: not url.startswith("data:"), answer)
    visited.page.on("console", hear)
    visited.page.on("pageerror", lambda error: visited.messages.append(str(error)))
    visited.page.goto(report.as_uri())
    return visited


def scroll_through(page: Page) -> None:
    """Every clip comes into sight once."""
    for clip in page.locator("video").all():
        clip.scroll_into_view_if_needed()


def open_details(page: Page) -> None:
    """What is folded away must hold as well."""
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")


def test_it_opens_without_an_error_and_asks_for_nothing(opened, page):
    scroll_through(page)
    open_details(page)
    page.wait_for_load_state("networkidle")
    assert opened.messages == []
    assert opened.requests == []


def test_a_page_that_asks_for_something_would_be_caught(browser, single, tmp_path):
    leaking = tmp_path / "leaking.html"
    text = single.read_text().replace("default-src 'none'", "default-src *")
    text = text.replace("img-src data:", "img-src *")
    leaking.write_text(text.replace("<main>", '<main><img src="https://example.org/a.png">'))
    visited = visit(browser, leaking)
    assert visited.requests == ["https://example.org/a.png"]
    assert visited.messages
    visited.page.context.close()


def test_it_is_one_file_of_a_size_that_can_be_mailed(report):
    assert report.stat().st_size < MAX_PAGE_BYTES


def test_every_clip_plays_and_loops(page):
    clips = page.locator("video").all()
    assert clips
    for clip in clips:
        clip.scroll_into_view_if_needed()
        handle = clip.element_handle()
        page.wait_for_function("v => v.readyState >= 2 && !v.paused && !v.error", arg=handle)
        before = clip.evaluate("v => v.currentTime")
        page.wait_for_function("([v, t]) => v.currentTime !== t", arg=[handle, before])
        assert clip.evaluate("v => v.loop && v.muted && v.videoWidth > 0 && v.duration > 1")


def test_every_picture_can_be_decoded(page):
    broken = page.evaluate(
        """async () => {
          const sources = [...document.querySelectorAll("img")].map((i) => i.src);
          sources.push(...[...document.querySelectorAll("video")].map((v) => v.poster));
          const broken = [];
          for (const source of sources) {
            const image = new Image();
            image.src = source;
            await image.decode().catch(() => broken.push(source.slice(0, 40)));
          }
          return broken;
        }"""
    )
    assert broken == []


@pytest.mark.parametrize("report", ["single"], indirect=True)
def test_the_button_stops_all_clips_and_the_slider_moves_them(page):
    page.locator("video").first.scroll_into_view_if_needed()
    page.wait_for_function("() => !document.querySelector('video').paused")
    page.locator("#play").click()
    assert page.locator("#play").text_content() == "Play"
    assert page.locator("video").evaluate_all("all => all.every(v => v.paused)")
    page.locator("#seek").fill("500")
    times = page.locator("video").evaluate_all("all => all.map(v => v.currentTime / v.duration)")
    assert times == pytest.approx([0.5] * len(times), abs=0.05)
    page.locator("#play").click()
    page.wait_for_function("() => !document.querySelector('video').paused")


def test_who_wants_less_motion_gets_clips_that_stand_still(browser, single):
    page = visit(browser, single, motion="reduce").page
    page.locator("video").first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    assert page.locator("video").evaluate_all("all => all.every(v => v.paused)")
    page.context.close()


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_it_never_scrolls_sideways(page, width):
    page.set_viewport_size(SIZE | {"width": width})
    open_details(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_in_both_schemes(page, scheme):
    page.emulate_media(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) > 128) == (scheme == "light")
    open_details(page)
    found = page.evaluate(CONTRASTS)
    assert len(found["texts"]) > 100
    assert len(found["lines"]) > 5
    assert [text for text in found["texts"] if text[1] < MIN_TEXT_CONTRAST] == []
    assert [line for line in found["lines"] if line[1] < MIN_LINE_CONTRAST] == []


@pytest.mark.parametrize("report", ["single"], indirect=True)
def test_a_curve_shows_its_values_under_the_pointer_and_under_the_keys(page):
    card = page.locator(".chart").filter(has=page.get_by_role("heading", name="fisher")).first
    legend, svg = card.locator(".legend"), card.locator("svg")
    assert legend.inner_text().split() == ["0.01667", "last"]
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    # The plane reaches from 48 to 350 of 360 units, and the axis from 0 to 60.
    page.mouse.move(
        box["x"] + box["width"] * (48 + 302 * 10 / 60) / 360, box["y"] + box["height"] / 2
    )
    assert legend.inner_text().split() == ["0.1", "at", "10"]
    assert card.locator(".cursor").count() == 1
    svg.focus()
    page.keyboard.press("ArrowRight")
    assert legend.inner_text().split() == ["0.09091", "at", "11"]


@pytest.mark.parametrize("report", ["comparison"], indirect=True)
def test_a_comparison_overlays_its_runs(page):
    names = page.locator(".runs li b").all_inner_texts()
    assert names == ["demo", "other", "young"]
    legend = page.locator(".chart .legend").first
    assert legend.locator("i").count() == 3
    # The youngest run ends at iteration 3; at rest, each curve shows its own last value.
    assert legend.locator("b").all_inner_texts() == ["0.01667", "0.01667", "0.3333"]
    assert page.locator(".cliprow").first.locator("video").count() == 4
