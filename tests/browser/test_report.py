"""The report in a real browser: what a person sees, on a desk, on a phone, in the dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.lives import troubled_run
from trm_dist.report import page as render
from trm_dist.report import tell_story

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)"),
    # Of the driver's own event loop, on its way out.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES = {"desk": (1280, 900), "phone": (375, 812)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-background-networking",
        ]
        yield driver.chromium.launch(executable_path=CHROMIUM, args=flags)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("browser")
    troubled_run(place / "run")
    path = place / "report.html"
    path.write_text(render(tell_story(str(place / "run"), is_verifying=True)))
    return path


@pytest.fixture(params=[("desk", "light"), ("phone", "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The page in both sizes and colour schemes; it may neither complain nor ask for anything."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=True
    )
    shown = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(report.as_uri())
    yield shown
    assert complaints == []
    assert [each for each in requests if not each.startswith("data:")] == [report.as_uri()]
    context.close()


def test_everybody_can_read_it(page: Page) -> None:
    found = Axe().run(page)

    assert [each["id"] for each in found.response["violations"]] == [], found.generate_report()


def test_it_fits_the_screen(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.locator("h1").is_visible()
    assert page.locator("dd.finished").inner_text() == "finished"


def test_curves_and_timeline_are_drawn(page: Page) -> None:
    curves = page.locator(".chart svg")
    assert curves.count() == 2
    for index in range(2):
        box = curves.nth(index).bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 150
    colours = page.evaluate(
        "[...document.querySelectorAll('.timeline rect')].map(each => getComputedStyle(each).fill)"
    )
    assert len(set(colours)) >= 4
    assert "rgb(0, 0, 0)" not in colours  # which is that of no colour at all


def test_keyboard_reaches_everything(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label') || ''"))
    assert {"Sums of time", "Starts", "Checkpoints"} <= set(reached)
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("0.1 (given)").is_visible()


def test_print_shows_everything_on_paper(page: Page) -> None:
    page.emulate_media(media="print", color_scheme="light")

    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".skip").is_hidden()
