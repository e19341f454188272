"""The site in a real browser: search, the way from a verdict to its tests, desks and phones."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lora.testing.plugin import requirement

ROOT = Path(__file__).parents[2]
SOURCES = "docs spec tests lora benchmarks conformance mkdocs.yml README.md CHANGELOG.md".split()
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
WIDTHS = {"desk": (1280, 800), "phone": (390, 844)}
PAGES = ["404.html", "", "idea/", "format/", "versioning/", "performance/"]
PAGES += [f"generated/{name}/" for name in "conformance traceability R4 benchmarks".split()]
PAGES += ["generated/reference/", "generated/lora.ArrowEngine/", "generated/reference-models/"]
PAGES += ["generated/reference-command-line/", "generated/lora-merge/"]
OUTSIDE: set[str] = set()
"""Hosts that pages ask for something that they can do without."""

pytestmark = pytest.mark.foreign


class Silent(http.server.SimpleHTTPRequestHandler):
    """A file server that writes no log."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly from a copy of what it is made of."""
    if not list((ROOT / "conformance").glob("*.json")):
        pytest.fail("no conformance/*.json to make a matrix of: run `make docs` first")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            left = shutil.ignore_patterns("__pycache__", "generated", "node_modules")
            shutil.copytree(ROOT / name, source / name, ignore=left)
        else:
            shutil.copy(ROOT / name, source / name)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    options = {"cwd": source, "env": {**environment, "PYTHONPATH": str(source)}}
    for command in (["docs/generate.py"], ["-m", "mkdocs", "build", "--strict", "--quiet"]):
        argv = [sys.executable, *command]
        done = subprocess.run(argv, **options, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return source / "site"


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site)))
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    programs = map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])
    program = next(filter(None, programs), None)
    if program is None:
        pytest.fail("no chromium: install it first, on Debian with `apt-get install chromium`")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, address):
    """A page of that width that reaches this site alone; its complaints are checked at the end."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, base_url=address)
    asked, errors = set(), []

    def ours_alone(route):
        if route.request.url.startswith(address):
            return route.continue_()
        asked.add(urlsplit(route.request.url).hostname)
        return route.abort()

    context.route("**/*", ours_alone)
    page = context.new_page()
    page.on("console", lambda message: errors.append(message) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - it wants a function
    yield page
    places = [urlsplit(getattr(error, "location", {}).get("url", "")) for error in errors]
    pairs = zip(errors, places, strict=True)
    faults = [str(error) for error, place in pairs if place.hostname not in OUTSIDE]
    context.close()
    assert faults == []
    assert asked <= OUTSIDE


def rows(page):
    """The rows of a page's tables whose first cell is a requirement's id: its link, and cells."""
    read = (
        "rows => rows.map(r => [r.querySelector('a')?.href, [...r.cells].map(c => c.textContent)])"
    )
    found = page.eval_on_selector_all("article table tbody tr", read)
    return {cells[0]: (link, cells) for link, cells in found if re.match(r"R\d+\.\d", cells[0])}


def shown(page, selector):
    """The texts of what is visible."""
    read = "all => all.filter(e => e.checkVisibility()).map(e => e.innerText)"
    return page.eval_on_selector_all(f"article {selector}", read)


@requirement("R10.8", "R24.5")
def test_every_verdict_of_the_matrix_leads_to_the_requirement_and_to_its_tests(page):
    page.goto("generated/conformance/")
    matrix = rows(page)
    paths = (ROOT / "conformance").glob("*.json")
    reports = [json.loads(path.read_text("utf-8")) for path in paths]
    assert set(matrix) == {name for report in reports for name in report["requirements"]}
    page.goto("generated/traceability/")
    assert {name: link for name, (link, _) in rows(page).items()}.items() >= {
        (name, link) for name, (link, _) in matrix.items()
    }
    page.goto("generated/traceability/#R4.1")  # an address of before there was a page a chapter
    page.locator("[id='R4.1'] a").click()
    for name, (link, cells) in matrix.items():
        assert link.endswith(f"generated/{name.partition('.')[0]}/#{name}")
        if page.url.partition("#")[0] != link.partition("#")[0]:
            page.goto(link)
            parts = page.inner_text("article").split("\nR")
        (part,) = [p for p in parts if re.match(rf"{re.escape(name[1:])}\D", p)]
        assert cells[-1] in part
        assert "::test_" in part
        assert part.count("lora-cards ") == 1


@requirement("R10.1", "R10.8", "R10.10")
def test_a_reader_comes_from_home_by_tutorial_and_reference_to_a_requirement_and_its_tests(page):
    page.goto("")
    for link, heading in [
        ("tutorial", "Tutorial: from nothing to a shared skill"),
        ("save", "lora.save"),
        ("R1 Card format", "R1 Card format"),
    ]:
        page.locator("article").get_by_role("link", name=link, exact=True).first.click()
        page.wait_for_selector(f"h1:has-text('{heading}')")
    assert "R1.1" in page.inner_text("article h2 >> nth=0")
    assert "properties/test_r01_card_format.py::test_" in page.inner_text("article li >> nth=0")


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("pending publisher", "versioning"),
        ("adapt", "lora.adapt"),
        ("fold_checkpoint", "lora.fold_checkpoint"),
        ("ArrowEngine", "lora.ArrowEngine"),
    ],
)
@requirement("R10.1", "R10.8")
def test_a_reader_searches_for_a_word_and_arrives_where_it_is_explained(page, word, place):
    page.goto("")
    if page.viewport_size["width"] < 1000:
        page.locator("label.md-header__button[for=__search]").click()
    field = page.get_by_role("textbox", name="Search")
    field.click()
    field.press_sequentially(word, delay=20)
    result = page.locator(".md-search-result__item a").first
    result.wait_for()
    result.click()
    page.wait_for_url(f"**/{place}/**")
    assert word in page.inner_text("article")


@requirement("R10.10")
def test_who_comes_to_no_page_is_shown_the_search_and_three_doors(page):
    page.goto("404.html")
    doors = ["Use it", "Look something up", "Read how it works"]
    assert [text.partition("\n")[0] for text in shown(page, ".grid li")] == doors
    page.locator("article").get_by_text("Search the site").click()
    page.get_by_role("textbox", name="Search").press_sequentially("merge", delay=20)
    page.locator(".md-search-result__item a").first.wait_for()


@requirement("R10.8")
def test_a_box_filters_the_rows_of_a_page_and_gives_them_back(page):
    page.goto("generated/specification/")
    everything, box = shown(page, "tbody tr"), page.get_by_role("searchbox", name="Filter the rows")
    box.fill("rollback MANAGER")
    assert [row.partition("\t")[0] for row in shown(page, "tbody tr")] == ["R22.2"]
    assert [heading[:3] for heading in shown(page, "h2")] == ["R22"]
    assert shown(page, "output") == [f"1 of {len(everything)} rows"]
    box.fill("no such word")
    assert shown(page, "table") == shown(page, "h2") == []
    assert shown(page, "output")[0].startswith("No row has all of these words.")
    box.press("Escape")
    assert shown(page, "tbody tr") == everything
    page.goto("generated/conformance/")
    page.get_by_role("searchbox", name="Filter the rows").fill("R4. threshold")
    assert {row.partition(".")[0] for row in shown(page, "tr:has(.sentence) td:first-child")} == {
        "R4"
    }
    page.goto("generated/reference/")
    page.get_by_role("searchbox", name="Filter the rows").fill("import_PEFT")
    (row,) = shown(page, "tbody tr")
    assert "lora.interop.peft.import_peft" in row
    page.goto("generated/benchmarks/")
    box = page.get_by_role("searchbox", name="Filter the rows")
    box.fill("224 modules safetensors")
    assert all("224 modules" in row for row in shown(page, "tbody tr"))
    assert len(shown(page, "tbody tr")) == len(shown(page, "details")) == 1
    box.fill("")
    assert shown(page, "tbody tr") == []
    assert len(shown(page, "details")) == 10


@pytest.mark.parametrize("place", PAGES, ids=lambda place: Path(place).name or "home")
@requirement("R10.7")
def test_a_page_fits_its_screen_and_its_links_go_somewhere(page, place, tmp_path):
    assert page.goto(place).ok
    page.wait_for_selector("article h1")
    page.screenshot(path=tmp_path / "page.png")
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    links = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    inside = {link.split("#")[0] for link in links if link.startswith("http://127.0.0.1")}
    assert inside
    assert not [link for link in sorted(inside) if not page.request.get(link).ok]
