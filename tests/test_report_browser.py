"""The page in a browser, where there is one."""

import shutil

import anndata
import numpy as np
import pytest

from genar.data import contract
from genar.report.figures import PANELS
from genar.report.page import write_page
from genar.report.subject import Subject, subjects


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the page is not tried")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver here: the page is not tried in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


class Opened:
    """A page in the browser."""

    def __init__(self, driver, path, width=1280):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(path.as_uri())
        self.until = WebDriverWait(driver, 30).until
        self.until(lambda d: d.execute_script("return document.body.dataset.ready") == "yes")

    def js(self, code):
        return self.driver.execute_script(f"return {code}")

    def told(self):
        return self.js("document.getElementById('told').textContent")

    def colours(self, panel):
        return self.js(f"Array.from(Bokeh.documents[0].get_model_by_name('spots').data['v_{panel}'])")

    def type(self, text):
        from selenium.webdriver.common.keys import Keys

        field = self.driver.find_element("id", "gene")
        field.clear()
        field.send_keys(text, Keys.ENTER)

    def picture(self, panel=0):
        return self.driver.find_elements("css selector", ".map")[panel].screenshot_as_png

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def page(report_run):
    return write_page(subjects(report_run)[0], report_run.parent / "page.html")


def test_in_a_browser_a_gene_is_chosen_by_typing(browser, page, report_run):
    opened = Opened(browser, page)
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    before, gene = opened.picture(1), next(g for g in predicted.var_names if g not in opened.told())
    opened.type(gene.lower())
    opened.until(lambda _: opened.told().startswith(gene))
    np.testing.assert_allclose(
        opened.colours("predicted"), np.log2(1 + predicted[:, gene].layers["mean"][:, 0]), rtol=1e-3, atol=1e-3
    )
    opened.until(lambda _: opened.picture(1) != before)
    opened.type("no-such-gene")
    opened.until(lambda _: "No gene no-such-gene" in opened.told())
    assert opened.js("performance.getEntriesByType('resource').length") == 0
    assert opened.errors() == []


def test_in_a_browser_genes_that_differ_in_case_alone_are_chosen_as_typed(browser, report_run, tmp_path):
    subject = subjects(report_run)[0]
    subject.predicted.var_names = ["Actb", "ACTB", *subject.predicted.var_names[2:]]
    opened = Opened(browser, write_page(Subject(subject.predicted), tmp_path / "case.html"))
    for name, other in (("ACTB", "ACTB"), ("Actb", "Actb"), ("actb", "Actb")):
        opened.type(name)
        opened.until(lambda _, other=other: opened.told().startswith(other))
    assert opened.errors() == []


def test_in_a_browser_labels_say_what_is_shown(browser, page):
    opened = Opened(browser, page)
    bar = "Bokeh.documents[0].get_model_by_name('bar_uncertainty').title"
    choose = (
        "(() => {{ const s = document.getElementById('{}'); s.value = '{}'; s.dispatchEvent(new Event('change')); }})()"
    )
    low, high = map(float, opened.js("Bokeh.documents[0].get_model_by_name('spots').data.interval[0]").split(" to "))
    assert opened.js(bar) == "log2(1 + width in counts)"
    assert opened.colours("uncertainty")[0] == pytest.approx(np.log2(1 + high - low), abs=0.02)
    assert " PCC " in opened.told()
    opened.js(choose.format("shown", "counts"))
    assert "PCC of the expected count" in opened.told()
    opened.js(choose.format("scale", "linear"))
    assert opened.js(bar) == "width, counts"
    assert opened.errors() == []


def test_in_a_browser_maps_move_together_and_a_unit_is_as_wide_as_high(browser, page):
    opened = Opened(browser, page)
    ranges = [f"Bokeh.documents[0].get_model_by_name('map_{p}').x_range.id" for p in PANELS]
    assert len({opened.js(one) for one in ranges}) == 1
    before, picture = opened.js("Bokeh.documents[0].get_model_by_name('x_range').start"), opened.picture()
    browser.find_element("id", "zoom-in").click()
    assert opened.js("Bokeh.documents[0].get_model_by_name('x_range').start") > before
    opened.until(lambda _: opened.picture() != picture)
    spans = opened.js(
        "['x', 'y'].map(a => { const p = Bokeh.documents[0].get_model_by_name('map_measured'), r = p[a + '_range'];"
        "return Math.abs(r.end - r.start) / p[a === 'x' ? 'inner_width' : 'inner_height']; })"
    )
    assert spans[0] == pytest.approx(spans[1], rel=1e-3)
    assert opened.errors() == []


def test_in_a_browser_a_group_shows_the_mean_of_its_genes(browser, page, report_run):
    opened = Opened(browser, page)
    boxes = browser.find_elements("css selector", ".groups button")
    boxes[0].click()
    opened.until(lambda _: "20 genes" in opened.told())
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    expected = np.log2(1 + predicted.layers["mean"].mean(axis=1))
    np.testing.assert_allclose(opened.colours("predicted"), expected, rtol=1e-3, atol=1e-3)
    assert all(value is None or value != value for value in opened.colours("uncertainty"))
    assert opened.errors() == []


def test_in_a_browser_everything_answers_the_keyboard(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened = Opened(browser, page)
    browser.find_element("id", "search").send_keys("zzz")
    opened.until(lambda _: opened.js("document.querySelectorAll('#genes tbody tr').length") == 0)
    browser.find_element("id", "search").send_keys(Keys.BACKSPACE * 3)
    opened.until(lambda _: opened.js("document.querySelectorAll('#genes tbody tr').length") == 20)
    head = browser.find_element("css selector", "#genes th:last-child button")
    head.send_keys(Keys.ENTER)
    values = [
        float(text)
        for text in opened.js("[...document.querySelectorAll('#genes td:last-child')].map(c => c.textContent)")
    ]
    assert values == sorted(values, reverse=True)
    browser.find_element("css selector", "#genes tbody tr:last-child button").send_keys(Keys.ENTER)
    last = opened.js("document.querySelector('#genes tbody tr:last-child button').textContent")
    opened.until(lambda _: opened.told().startswith(last))
    start = opened.js("Bokeh.documents[0].get_model_by_name('x_range').start")
    opened.js("document.getElementById('maps').focus()")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert opened.js("Bokeh.documents[0].get_model_by_name('x_range').start") > start
    for key, value in (("scale", "linear"), ("palette", "cividis"), ("uncertainty", "zero"), ("shown", "counts")):
        browser.find_element("id", key).send_keys({"linear": "counts", "cividis": "cividis"}.get(value, value[:4]))
    assert opened.errors() == []


def test_in_a_browser_a_phone_scrolls_no_sideways(browser, page):
    opened = Opened(browser, page, width=390)
    assert opened.js("document.documentElement.scrollWidth") <= 390
    assert opened.js("[...document.querySelectorAll('.map')].every(m => m.getBoundingClientRect().width <= 390)")
    assert opened.js("Bokeh.documents[0].get_model_by_name('map_predicted').toolbar.active_drag") is None
    assert opened.errors() == []


def test_in_a_browser_names_from_files_do_nothing(browser, report_run, tmp_path):
    subject = subjects(report_run)[0]
    evil = "</script><img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    subject.predicted.uns[contract.GENAR][contract.SECTION] = evil
    subject.predicted.var_names = [evil, *subject.predicted.var_names[1:]]
    opened = Opened(browser, write_page(Subject(subject.predicted), tmp_path / "evil.html"))
    opened.type(evil)
    opened.until(lambda _: opened.told().startswith("</script>"))
    assert opened.js("document.title").startswith("Section </script>")
    assert opened.js("document.images.length") == 0
    assert opened.errors() == []
