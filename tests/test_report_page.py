"""The page of a search's report: its text, and its behavior in a browser, offline, on a phone and by keyboard."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nulsq.run.directory import lock_folder
from tests.searches import MARKUP, evaluation, marked_search, two_studies
from tune.report import write
from tune.report.__main__ import main
from tune.report.figures import SavedFigure, learning_curves
from tune.report.findings import Findings
from tune.report.importance import Importance, importance
from tune.report.page import Figures, StudyFigures, render
from tune.report.responses import importance_figure, response_figure
from tune.report.timeline import read_timeline
from tune.space import Sampler, Search, Study, Trial
from tune.store import journal
from tune.store.results import TrialResult, collect
from tune.store.status import TrialStatus

for module in ("matplotlib", "optuna", "pandas", "pyarrow", "sklearn"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The findings of a search, and the paths of its report."""
    findings = two_studies(tmp_path_factory.mktemp("page") / "search")
    return findings, write(findings.search, findings.folder, findings.results, findings.tests)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The folder of a search with markup in its name and settings."""
    return marked_search(tmp_path_factory.mktemp("marked") / "search").directory


# ---- the page as text


class Page(HTMLParser):
    """Elements of a page: (name, attributes), and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        """The text with its white space collapsed, as a browser shows it."""
        return " ".join("".join(self.text).split())

    def all(self, *names):
        return [attributes for tag, attributes in self.elements if tag in names]


def test_page_is_escaped_and_loads_nothing(marked, tmp_path, capsys):
    winner = Findings(search := journal.load_folder(marked), collect(search, journal.read(marked)), {}).winner("plain")
    (winner.rows[0].path / "test.json").write_text(json.dumps(evaluation(91.5)))
    assert main([str(marked), "--out", str(tmp_path / "page")]) == 0
    assert "study plain: winner's test top-1 91.50 (359 images)" in capsys.readouterr().out
    file = tmp_path / "page" / "index.html"
    page = Page(file.read_text())
    assert not page.all("b", "iframe", "object", "embed") and MARKUP in "".join(page.text)
    assert "91.50" in page.text and "at least 8 are needed" in "".join(page.text)
    html_without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", file.read_text())
    assert not re.search(r"https?://|@import|url\(|\bsrc=\"(?!\")", html_without_images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(link["href"].startswith(("#", "data:,")) for link in page.all("a", "link"))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    references = {link["href"][1:] for link in page.all("a")} | {
        attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert references <= ids
    assert sorted(path.name for path in marked.glob("trials.*")) == ["trials.csv", "trials.jsonl", "trials.parquet"]
    assert main([str(marked), "--out", str(tmp_path / "page"), "--no-test"]) == 0
    assert "91.50" not in Page(file.read_text()).text


def rendered(findings: Findings) -> str:
    """The page of findings without figures."""
    names = [study.name for study in findings.studies]
    return render(findings, read_timeline(findings), {name: Importance(reason="none") for name in names},
                  Figures({name: StudyFigures() for name in names}, {}, None))


HOSTILE = """"><script>alert('x')</script></style></title><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}&amp;"""


def test_hostile_names_and_values_appear_as_text(tmp_path):
    """Everything that a user names or sets, in text and in attributes, is shown as it is."""
    search = Search(name=HOSTILE, recipe=HOSTILE, overrides={HOSTILE: HOSTILE}, metric="val_top1", dir=str(tmp_path),
                    space={HOSTILE: Sampler(HOSTILE, "choice", values=[HOSTILE, "plain"])}, finalists=2)
    trials = [Trial("s", i, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, HOSTILE) for i in range(3)]
    results = [TrialResult(trial, TrialStatus.FINISHED, 1, 50.0 + trial.number, [50.0], 1.0,
                           tmp_path / str(trial.number)) for trial in trials]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "code.txt").write_text(f"2026-01-01 00:00:00  {HOSTILE}\n{HOSTILE}\n{HOSTILE}\n")
    findings = Findings(search, results, {})
    findings.full_epochs, findings.studies = {HOSTILE: 1, "s": 1}, [Study("s", {HOSTILE: HOSTILE}), Study(HOSTILE, {})]
    path = tmp_path / "figure.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x03")
    figure = SavedFigure(path, alt=HOSTILE, caption=HOSTILE, wide=True)
    html = render(findings, read_timeline(findings), {name: Importance(reason=HOSTILE) for name in ("s", HOSTILE)},
                  Figures({name: StudyFigures(curves=figure) for name in ("s", HOSTILE)}, {}, figure))
    page = Page(html)
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("title")) == 1 and not page.all("b")
    assert all(set(image) == {"src", "alt", "width", "height"} and image["alt"] == HOSTILE for image in page.all("img"))
    assert len(page.all("img")) == 3 and page.all("img")[0]["width"] == "2" and page.all("img")[0]["height"] == "3"
    assert HOSTILE in {cell.get("data-key") for cell in page.all("td")}
    assert page.words.count(HOSTILE) == page.words.count("alert(1)") == page.words.count("{{ 7 * 7 }}") > 30


def test_page_of_an_unfinished_search_states_its_status(marked, tmp_path, capsys):
    folder = tmp_path / "search"
    shutil.copytree(marked, folder)
    (folder / "finished").unlink()
    key = journal.read(folder)[-1].key
    (folder / "trials" / key / "outcome.json").unlink()
    (folder / "rungs").unlink()
    search = journal.load_folder(folder)
    findings = Findings(search, collect(search, journal.read(folder)), {})
    text = Page(rendered(findings)).words
    assert "This search is not finished" in text and "7 of 8 trials have ended" in text
    assert findings.status(findings.results[-1]) == "interrupted" and "interrupted" in text
    lock = lock_folder(folder, "searching")
    assert main([str(folder)]) == 0
    lock.close()
    text = Page((folder / "report" / "index.html").read_text()).words
    assert "This search is still running" in text and "interrupted" not in text
    assert main([str(tmp_path)]) == 2 and "is not the folder of a search" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["val_loss", "val_top1"])
def test_figures_are_drawn_for_every_distribution(tmp_path, metric):
    """Dollar signs in names and values do not start formulas: as formulas, these would be invalid."""
    search = Search(name="kinds", metric=metric, trials=12, space={
        r"$\choice{$": Sampler("optim.optimizer", "choice", values=["sgd", r"$\adamw{$"]),
        "uniform": Sampler("optim.momentum", "uniform", 0.5, 0.99)})
    results = []
    for i in range(12):
        drawn = {name: sampler.quantile((i + 0.5) * 0.618 % 1) for name, sampler in search.space.items()}
        curve = [3 - 2 * drawn["uniform"] + (drawn[r"$\choice{$"] == "sgd"), 1.0, float("nan") if i == 3 else 0.5]
        status = TrialStatus.DIVERGED if i == 3 else TrialStatus.FINISHED
        results.append(TrialResult(Trial("kinds", i, drawn=drawn), status, 3, curve[-1],
                                   curve, 3.0, tmp_path / str(i)))
    results.append(TrialResult(Trial("kinds", 12, drawn=drawn), TrialStatus.DIVERGED, 1, 0.0, [float("nan")], 1.0,
                               tmp_path / "12"))
    findings = Findings(search, results, {})
    findings.full_epochs = {"kinds": 3}
    comparison = findings.comparison("kinds")
    assert comparison.epoch == 3 and comparison.imputed.count(True) == 2
    assert "same score" in importance(search.space, comparison).reason
    results[:] = [replace(result, curve=result.curve[:1]) for result in results]
    comparison = findings.comparison("kinds")
    worst = (max if metric == "val_loss" else min)(comparison.scores)
    assert comparison.epoch == 1 and comparison.scores[-1] == worst
    assert comparison.imputed == [False] * 12 + [True]
    shares = importance(search.space, comparison, bootstraps=3, shuffles=1)
    for figure in (learning_curves(findings, "kinds", tmp_path / "a.png"),
                   response_figure(findings, "kinds", comparison, tmp_path / "b.png"),
                   importance_figure("kinds", shares, tmp_path / "c.png")):
        assert figure.path.stat().st_size > 1000 and "kinds" in figure.alt


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                     "disable-component-update", "disable-sync", "disable-dev-shm-usage",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))  # given, so none is downloaded
    yield driver
    driver.quit()


def emulate_phone(browser, width=360, height=740):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 2, "mobile": True})


def test_page_works_in_a_browser(written, browser):
    """Opened from disk, offline, on an emulated phone, and used by keyboard."""
    from selenium.webdriver.common.keys import Keys
    findings, paths = written
    page = next(path for path in paths if path.name == "index.html")
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {
        "offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})
    emulate_phone(browser)
    browser.get(page.as_uri())
    run = browser.execute_script
    run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert run("return document.images.length") == sum(path.suffix == ".png" for path in paths) >= 9
    assert run("return [...document.images].every(image => image.alt.length > 20)")
    assert run("return ['header', 'nav', 'main', 'footer'].map(tag => document.querySelectorAll(tag).length)")[2] == 1
    levels = run("return [...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.tagName[1])")
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

    trials = browser.find_element("css selector", "[aria-labelledby='all-caption'] table")
    buttons = [button for button in trials.find_elements("css selector", "th button") if button.text == "val_top1"]
    buttons[0].send_keys(Keys.ENTER)
    shown = run("return [...arguments[0].tBodies[0].rows].map(row => row.cells[6].innerText)", trials)
    known = [float(text) for text in shown if text != "–"]
    assert known == sorted(known) and len(shown) == len(findings.results) and shown[-1] == "–"  # unknown scores last

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {event["params"]["request"]["url"] for event in events
                 if event["method"] == "Network.requestWillBeSent"}
    internal = ("data:", "chrome:", "chrome-untrusted:")  # the last two are the browser's new tab
    assert {url for url in requested if not url.startswith(internal)} == {page.as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_sufficient_contrast(written, browser, scheme):
    """At least 4.5 : 1 (WCAG AA) between the color of each text and its background."""
    _, paths = written
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(next(path for path in paths if path.name == "index.html").as_uri())
    lowest_contrast = browser.execute_script("""
        const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(v => v / 255).map(
            v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
        const behind = node => { for (; node; node = node.parentElement) { const color =
            getComputedStyle(node).backgroundColor; if (!color.endsWith(', 0)')) return color; } return 'rgb(0,0,0)'; };
        return Math.min(...[...document.querySelectorAll('h1,h2,h3,p,a,li,th,td,dt,dd,figcaption,button,footer,code')]
            .map(node => {
                const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
                return (pair[1] + 0.05) / (pair[0] + 0.05); }));""")
    assert 4.5 <= lowest_contrast < 21
