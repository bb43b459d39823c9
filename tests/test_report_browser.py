"""The report as somebody opens it: in a real browser, offline, with nothing put in its place."""

import re
import shutil
import time

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from forvalue_callbacks.policies import Drop
from helpers.reports import HOSTILE, explanation, judged_scores, prompts

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
    ),
    pytest.mark.xdist_group("browser"),  # one of them
]
N = 300


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shows(browser, tmp_path):
    """Opens the report of scores; at the end nothing has gone wrong, and nothing but the file has been asked for."""
    file = tmp_path / "report.html"

    def show(scores, *args, theme="light", **beside):
        scores.report(file, *args, **beside)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(file.as_uri())
        return browser

    browser.get_log("browser"), browser.get_log("performance")  # those of the test before
    yield show
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    asked = [re.search(r'"url":"([^"]*)"', text)[1] for text in asked if '"Network.requestWillBeSent"' in text]
    assert file.as_uri() in asked
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []


def says(page, css):
    return page.find_element(By.CSS_SELECTOR, css).text


def rows_shown(page):
    return page.find_elements(By.CSS_SELECTOR, ".row:not([hidden])")


def move_to(page, position):
    """The slider, as a hand does."""
    script = "s = document.getElementById('slider'); s.value = arguments[0];"
    script += "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change'));"
    page.execute_script(script, position)


def table(page):
    """Rows, dropped, share, by group."""
    lines = page.find_elements(By.CSS_SELECTOR, "#groups tbody tr")
    cells = [[cell.text for cell in line.find_elements(By.TAG_NAME, "td")] for line in lines]
    return {name: (int(n.replace(",", "")), int(gone.replace(",", ""))) for name, n, gone, *_ in cells}


def test_the_page_opens_with_the_cut_of_the_policy(shows):
    scores = judged_scores(N)
    page = shows(scores, prompts(N), weights=Drop(0.25)(scores.values))
    gone = round(0.25 * (N - 2))
    assert f"drops {gone} of {N - 2} rows" in says(page, "#says")
    assert sum(lost for _, lost in table(page).values()) == gone
    assert len(page.find_elements(By.CSS_SELECTOR, "#plot rect.gone")) > 0
    assert page.find_element(By.ID, "line").is_displayed()


def test_the_slider_recounts_all_rows_and_each_source(shows):
    scores = judged_scores(N)
    rows = prompts(N)
    page = shows(scores, rows)
    edges = page.execute_script("return data.edges")
    sources = np.array([row["source"] for row in rows])
    for position in (0, 40, 100, 161):
        move_to(page, position)
        gone = scores.values < (edges[position - 1] if position else -np.inf)
        assert f"drops {gone.sum()} of" in says(page, "#says")
        found = table(page)
        for source in set(sources):
            assert found[source][1] == (gone & (sources == source)).sum()


def test_the_slider_moves_by_the_keyboard(shows):
    page = shows(judged_scores(N), prompts(N))
    before = says(page, "#where")
    page.find_element(By.ID, "slider").send_keys(Keys.ARROW_RIGHT * 5)
    assert says(page, "#where") != before


def test_groups_that_lose_more_than_half_are_named_and_the_first(shows):
    scores = judged_scores(N)
    rows = prompts(N)
    worst = [row["row"] for row in scores.worst(20)]
    for row in worst:
        rows[row]["source"] = "bad shop"
    page = shows(scores, rows)
    assert "bad shop" in says(page, "#most")
    assert next(iter(table(page))) == "bad shop"
    move_to(page, 0)
    assert not page.find_element(By.ID, "most").is_displayed()


def test_another_grouping_is_chosen_and_a_group_is_seen_in_the_histogram(shows):
    page = shows(judged_scores(N), prompts(N))
    buttons = page.find_elements(By.CSS_SELECTOR, ".pick button")
    assert [button.text for button in buttons] == ["source", "kind of noise", "labelled tokens"]
    buttons[1].click()
    assert set(table(page)) == {"wrong answer", "none"}
    page.find_element(By.CSS_SELECTOR, "#groups tbody tr").click()
    heights = (
        "return [...document.querySelectorAll('#plot rect.level')].filter((r) => r.getAttribute('height') > 0).length"
    )
    assert page.execute_script(heights) > 0
    page.find_element(By.CSS_SELECTOR, "#groups tbody tr").click()
    assert page.execute_script(heights) == 0


def test_rows_are_filtered_and_found(shows):
    scores = judged_scores(N)
    page = shows(scores, prompts(N))
    row = scores.worst(1)[0]["row"]
    everything = len(rows_shown(page))
    search = page.find_element(By.ID, "search")
    search.send_keys(f"QUESTION {row}")
    assert f"row-{row}" in [found.get_attribute("id") for found in rows_shown(page)]
    assert len(rows_shown(page)) < everything / 2
    assert says(page, "#shown").startswith(f"{len(rows_shown(page))} of ")
    assert sum(row.is_displayed() for row in page.find_elements(By.CSS_SELECTOR, ".row")) == len(rows_shown(page))
    search.clear()
    search.send_keys("nowhere at all")
    assert rows_shown(page) == []
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys(Keys.DELETE)
    assert len(rows_shown(page)) == everything
    Select(page.find_element(By.ID, "kind")).select_by_visible_text("wrong answer")
    assert {found.get_attribute("data-kind") for found in rows_shown(page)} == {"wrong answer"}
    Select(page.find_element(By.ID, "group")).select_by_visible_text("wiki")
    Select(page.find_element(By.ID, "list")).select_by_visible_text("Worst")
    left = rows_shown(page)
    assert {found.get_attribute("data-group") for found in left} == {"wiki"}
    assert {found.get_attribute("data-list") for found in left} == {"worst"}


def background(page):
    color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return float(np.mean([int(x) for x in re.findall(r"\d+", color)[:3]]))


def test_the_theme_is_the_systems_until_one_is_chosen(shows):
    scores = judged_scores(N)
    page = shows(scores, theme="dark")
    assert background(page) < 60
    page = shows(scores, theme="light")
    assert background(page) > 200
    button = page.find_element(By.ID, "theme")
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text, background(page) > 128))
    assert seen == [("Theme: light", True), ("Theme: dark", False), ("Theme: auto", True)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(shows, theme):
    """4.5 to 1, as the accessibility guidelines have it."""
    page = shows(judged_scores(N), prompts(N), theme=theme)
    script = (
        "const rgb = (node, name) => getComputedStyle(node)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);"
        "return ['h1', '.note', '.words dt', 'a', '.says'].map((css) => [css,"
        " rgb(document.querySelector(css), 'color'), rgb(document.body, 'backgroundColor')])"
    )
    for css, *colors in page.execute_script(script):
        light, dark = sorted((luminance(color) for color in colors), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, css


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_what_a_hostile_row_holds_is_text(shows):
    scores = judged_scores(N, unscored=0)
    rows = prompts(N, hostile=range(0, N, 2))
    page = shows(
        scores,
        rows,
        validation=prompts(40, hostile=range(40)),
        explanations=[explanation(4)],
        findings=[(HOSTILE, [1])],
        warnings=[HOSTILE],
        run={"data": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE},
    )
    assert "hacked" not in page.title.split("<img")[0]
    assert page.execute_script("return document.title") == page.title
    assert page.title.startswith("For-Value report")
    assert page.find_elements(By.CSS_SELECTOR, "main img, main script") == []
    text = says(page, "#row-4 .text")
    for part in (
        "<img src=x onerror=",
        "</script><script>",
        "{{ 7 * 7 }}",
        "&amp;",
        "[U+202E]",
        "[U+2028]",
        "[U+D800]",
    ):
        assert part in text
    assert any(name.startswith("<img") for name in table(page))
    options = Select(page.find_element(By.ID, "group")).options
    assert len(options) == 5, "any, its source, and three others"
    next(option for option in options if option.text.startswith("<img")).click()
    assert "row-4" in [row.get_attribute("id") for row in rows_shown(page)]
    assert 0 < len(rows_shown(page)) <= N / 2


def test_a_narrow_window_does_not_scroll_sideways(shows):
    scores, word = judged_scores(N), "letters" * 60
    evidence = scores.metadata["noise"]["evidence"]
    evidence[word] = evidence["truncated"]
    rows = [{"prompt": word, "completion": word, "source": f"{word} {row % 2}"} for row in range(N)]
    page = shows(scores, rows, validation=rows, explanations=[explanation(4)], run={"data": word}, warnings=[word])
    page.execute_script("for (const node of document.querySelectorAll('details')) node.open = true")
    size = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 380
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_hundred_thousand_rows_open(shows, tmp_path):
    n = 100_000
    started = time.perf_counter()
    page = shows(judged_scores(n), prompts(n), explanations=[explanation(row) for row in range(20, 60)])
    size = (tmp_path / "report.html").stat().st_size
    assert size < 5_000_000
    assert "of 99,998 rows" in says(page, "#says")
    ms = page.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"{n:,} rows: {size / 1e6:.2f} MB, open after {ms:.0f} ms ({time.perf_counter() - started:.1f} s to write)")
