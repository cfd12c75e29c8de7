"""The page of a search's report: as text, and in a real browser, from a disk, offline, on a phone, by keyboard."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nulsq.run.directory import lock_folder
from tests.searches import MARKUP, evaluation, marked_search, two_studies
from tune.report import write
from tune.report.__main__ import main
from tune.report.figures import curves
from tune.report.findings import Findings
from tune.report.importance import importance
from tune.report.page import notice
from tune.report.responses import bars, response
from tune.space import Sampler, Search, Trial
from tune.store import journal
from tune.store.results import TrialResult, collect
from tune.store.status import TrialStatus

for module in ("matplotlib", "optuna", "pandas", "pyarrow", "sklearn"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Findings, and the paths of everything written."""
    findings = two_studies(tmp_path_factory.mktemp("page") / "search")
    return findings, write(findings.search, findings.folder, findings.rows, findings.tests)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The folder of a search with markup in it."""
    return marked_search(tmp_path_factory.mktemp("marked") / "search").directory


# ---- the page as text


class Page(HTMLParser):
    """Elements of a page: (name, attributes), and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.elements if tag in names]


def test_the_command_writes_a_page_that_is_escaped_and_loads_nothing(marked, tmp_path, capsys):
    winner = Findings(search := journal.load_folder(marked), collect(search, journal.read(marked)), {}).winner("plain")
    (winner.rows[0].path / "test.json").write_text(json.dumps(evaluation(91.5)))
    assert main([str(marked), "--out", str(tmp_path / "page")]) == 0
    assert "study plain: winner's test top-1 91.50 (359 images)" in capsys.readouterr().out
    file = tmp_path / "page" / "index.html"
    page = Page(file)
    assert not page.all("b", "iframe", "object", "embed") and MARKUP in "".join(page.text)
    assert "91.50" in page.text and "fewer than 8 say nothing" in "".join(page.text)
    raw = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", file.read_text())
    assert not re.search(r"https?://|@import|url\(|\bsrc=\"(?!\")", raw)
    assert all(each["src"].startswith("data:image/png;base64,") and len(each["alt"]) > 20 for each in page.all("img"))
    assert all(each["href"].startswith(("#", "data:,")) for each in page.all("a", "link"))
    there = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    referred = {each["href"][1:] for each in page.all("a")} | {
        attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert referred <= there
    assert sorted(path.name for path in marked.glob("trials.*")) == ["trials.csv", "trials.jsonl", "trials.parquet"]
    assert main([str(marked), "--out", str(tmp_path / "page"), "--no-test"]) == 0 and "91.50" not in Page(file).text


def test_a_search_that_is_not_finished_says_so(marked, tmp_path, capsys):
    folder = tmp_path / "search"
    shutil.copytree(marked, folder)
    (folder / "finished").unlink()
    key = journal.read(folder)[-1].key
    (folder / "trials" / key / "outcome.json").unlink()
    (folder / "rungs").unlink()
    search = journal.load_folder(folder)
    findings = Findings(search, collect(search, journal.read(folder)), {})
    assert "This search is not finished" in notice(findings) and "7 of its 8 trials" in notice(findings)
    assert findings.status(findings.rows[-1]) == "interrupted"
    held = lock_folder(folder, "searching")
    assert main([str(folder)]) == 0
    held.close()
    text = "".join(Page(folder / "report" / "index.html").text)
    assert "This search is still running" in text and "interrupted" not in text
    assert main([str(tmp_path)]) == 2 and "is not the folder of a search" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["val_loss", "val_top1"])
def test_pictures_of_every_kind_of_hyperparameter(tmp_path, metric):
    search = Search(name="kinds", metric=metric, trials=12, space={
        "choice": Sampler("optim.optimizer", "choice", values=["sgd", "adamw"]),
        "uniform": Sampler("optim.momentum", "uniform", 0.5, 0.99)})
    rows = []
    for i in range(12):
        drawn = {name: sampler.quantile((i + 0.5) * 0.618 % 1) for name, sampler in search.space.items()}
        curve = [3 - 2 * drawn["uniform"] + (drawn["choice"] == "sgd"), 1.0, float("nan") if i == 3 else 0.5]
        status = TrialStatus.DIVERGED if i == 3 else TrialStatus.FINISHED
        rows.append(TrialResult(Trial("kinds", i, drawn=drawn), status, 3, curve[-1], curve, 3.0, tmp_path / str(i)))
    rows.append(TrialResult(Trial("kinds", 12, drawn=drawn), TrialStatus.DIVERGED, 1, 0.0, [float("nan")], 1.0,
                            tmp_path / "12"))
    findings = Findings(search, rows, {})
    findings.full = {"kinds": 3}
    found = findings.comparison("kinds")
    assert found.epoch == 3 and found.imputed.count(True) == 2  # where scores differ in nothing, they say nothing
    assert "same score" in importance(search.space, found).why
    rows[:] = [replace(row, curve=row.curve[:1]) for row in rows]
    found = findings.comparison("kinds")
    worst = (max if metric == "val_loss" else min)(found.scores)
    assert found.epoch == 1 and found.scores[-1] == worst and found.imputed == [False] * 12 + [True]
    for made in (curves(findings, "kinds", tmp_path / "a.png"), response(findings, "kinds", found, tmp_path / "b.png"),
                 bars("kinds", importance(search.space, found, bootstraps=3, shuffles=1), tmp_path / "c.png")):
        assert made.path.stat().st_size > 1000 and "kinds" in made.alt


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                     "disable-component-update", "disable-sync", "disable-dev-shm-usage",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))  # the driver is named: none is downloaded
    yield started
    started.quit()


def on_a_phone(browser, width=360, height=740):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 2, "mobile": True})


def test_the_page_in_a_browser(made, browser):
    """From a disk, offline, on a phone, by keyboard."""
    from selenium.webdriver.common.keys import Keys
    findings, paths = made
    page = next(path for path in paths if path.name == "index.html")
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {
        "offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})
    on_a_phone(browser)
    browser.get(page.as_uri())
    run = browser.execute_script
    run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert run("return [...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert run("return document.images.length") == sum(path.suffix == ".png" for path in paths) >= 9
    assert run("return [...document.images].every(each => each.alt.length > 20)")
    assert run("return ['header', 'nav', 'main', 'footer'].map(each => document.querySelectorAll(each).length)")[2] == 1
    levels = run("return [...document.querySelectorAll('h1, h2, h3')].map(each => +each.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert run("return document.documentElement.lang") == "en"

    def focused():
        return browser.switch_to.active_element

    body = browser.find_element("css selector", "body")
    body.send_keys(Keys.TAB)
    assert focused().text == "Skip to the results"
    for _ in range(40):
        focused().send_keys(Keys.TAB)
        if focused().tag_name == "button" and focused().text == "test top-1":
            break
    button = focused()
    assert button.tag_name == "button"

    def column():
        return run("const cell = arguments[0].closest('th'); return [cell.ariaSort, ...[...cell.closest('table')"
                   ".tBodies[0].rows].map(row => row.cells[0].innerText)]", button)

    assert column() == ["none", "2", "4"]
    button.send_keys(Keys.ENTER)
    assert column() == ["ascending", "2", "4"]
    button.send_keys(Keys.ENTER)
    assert column() == ["descending", "4", "2"]

    every = browser.find_element("css selector", "[aria-labelledby='all-caption'] table")
    scores_ = [each for each in every.find_elements("css selector", "th button") if each.text == "val_top1"]
    scores_[0].send_keys(Keys.ENTER)
    shown = run("return [...arguments[0].tBodies[0].rows].map(row => row.cells[6].innerText)", every)
    known = [float(text) for text in shown if text != "–"]
    assert known == sorted(known) and len(shown) == len(findings.rows) and shown[-1] == "–"  # unknown ones last

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
    own = ("data:", "chrome:", "chrome-untrusted:")  # the last two are the browser's own new tab
    assert {url for url in asked if not url.startswith(own)} == {page.as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(made, browser, scheme):
    """At least 4.5 : 1 (WCAG AA) between each text's colour and what is behind it."""
    _, paths = made
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(next(path for path in paths if path.name == "index.html").as_uri())
    least = browser.execute_script("""
        const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(v => v / 255).map(
            v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
        const behind = each => { for (; each; each = each.parentElement) { const found =
            getComputedStyle(each).backgroundColor; if (!found.endsWith(', 0)')) return found; } return 'rgb(0,0,0)'; };
        return Math.min(...[...document.querySelectorAll('h1,h2,h3,p,a,li,th,td,dt,dd,figcaption,button,footer,code')]
            .map(each => { const two = [light(getComputedStyle(each).color), light(behind(each))].sort((a, b) => a - b);
                           return (two[1] + 0.05) / (two[0] + 0.05); }));""")
    assert 4.5 <= least < 21
