"""The page of a run or a prediction: its matrices, scores, groups, provenance and truth."""

import base64
import json
import re
import shutil
import zlib

import anndata
import numpy as np
import pytest
from bokeh.models import ColorBar

from commands import run
from genar.data import contract, read_sections
from genar.errors import InputError
from genar.report.figures import PANELS, spot_maps
from genar.report.index import write_report
from genar.report.matrices import pack
from genar.report.page import page_html, write_page
from genar.report.subject import Subject, subjects


def unpack(packed, n_genes):
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype=packed["type"])
    return (values.reshape(n_genes, -1) * np.array(packed["step"])[:, None]).T


@pytest.mark.parametrize("values", [[[0, 70000], [3, 1]], [[0.0, 0.123], [9.75, 0.456]], [[0, 0], [0, 0]]])
def test_a_packed_matrix_holds_its_values(values):
    values = np.array(values)
    found = unpack(pack(values), values.shape[1])
    tolerance = 0 if values.dtype.kind == "i" else values.max(axis=0) / 65535
    assert (np.abs(found - values) <= tolerance).all()


def payload_of(html):
    return json.loads(re.search(r'id="payload">(.*?)</script>', html, re.S)[1])


def test_the_page_of_a_run_holds_counts_scores_groups_and_provenance(report_run, tissue):
    subject = subjects(report_run)[0]
    html = page_html(subject)
    payload = payload_of(html)
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    (truth,) = [one for one in read_sections(tissue) if contract.name(one) == "SIM2"]
    genes = list(predicted.var_names)
    assert payload["genes"] == genes
    for name, expected in {
        "measured": contract.counts(truth, genes),
        "counts": contract.counts(predicted, genes),
        "low": predicted.layers["q05"],
        "high": predicted.layers["q95"],
    }.items():
        np.testing.assert_array_equal(unpack(payload["matrices"][name], len(genes)), expected)
    np.testing.assert_allclose(
        unpack(payload["matrices"]["mean"], len(genes)), predicted.layers["mean"], rtol=1e-4, atol=1e-2
    )
    for row in payload["groups"]:
        assert sorted(gene for group in row for gene in group) == list(range(len(genes)))
    assert [len(row) for row in payload["groups"]] == list(subject.scales.sizes)
    found = json.loads((report_run / "intervals.json").read_text())["SIM2"]
    value, low, high = found["methods"]["ridge"]["mse"]
    assert f"{value:.3f} <small>{low:.3f} to {high:.3f}</small>" in html
    for words in (
        "genar_mean minus ridge",
        "SIM1",
        "efficientnet_lite0",
        "not for clinical decisions",
        "Validation MSE",
    ):
        assert words in html
    assert "://" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)  # nothing is asked of the network


def test_a_prediction_alone_has_no_truth_and_none_is_made_up(report_run, tmp_path):
    alone = shutil.copy(report_run / "predictions" / "SIM2.h5ad", tmp_path / "alone.h5ad")
    (subject,) = subjects(alone)
    payload = payload_of(page_html(subject))
    assert subject.truth is None
    assert "measured" not in payload["matrices"]
    assert set(payload["table"]) == {"mean predicted"}
    assert payload["groups"] == []


def test_truth_of_another_order_is_put_in_the_predictions_order(report_run, tissue, tmp_path):
    alone = tmp_path / "alone.h5ad"
    predicted = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    predicted[::-1].copy().write_h5ad(alone)
    (subject,) = subjects(alone, f"{tissue}:SIM2")
    assert list(subject.truth.obs_names) == list(predicted.obs_names)[::-1]
    assert subject.scores["pcc_200"] == pytest.approx(subjects(report_run)[0].scores["pcc_200"])
    assert set(subject.methods) == {"prediction", "prediction_mean"}


def test_truth_of_another_section_is_refused_or_told(report_run, tissue, tmp_path):
    moved = anndata.read_h5ad(report_run / "predictions" / "SIM2.h5ad")
    moved.obsm["spatial"] = moved.obsm["spatial"] + 1000
    moved.write_h5ad(tmp_path / "moved.h5ad")
    with pytest.raises(InputError, match="are both of the same section"):
        subjects(tmp_path / "moved.h5ad", f"{tissue}:SIM2")
    moved.obsm["spatial"] = moved.obsm["spatial"] - 1000
    moved.uns[contract.GENAR][contract.SECTION] = "OTHER"
    moved.write_h5ad(tmp_path / "moved.h5ad")
    (subject,) = subjects(tmp_path / "moved.h5ad", f"{tissue}:SIM2")
    assert "truth is of section SIM2" in subject.notes[0]


def test_a_run_whose_sections_are_gone_says_so(report_run, tmp_path):
    moved = shutil.copytree(report_run, tmp_path / "moved")
    facts = json.loads((moved / "run.json").read_text())
    facts["plan"]["sections"] = str(tmp_path / "nowhere")
    (moved / "run.json").write_text(json.dumps(facts))
    (subject,) = subjects(moved)
    assert subject.truth is None
    assert "--truth" in subject.notes[0]
    assert "--truth" in page_html(subject)


def test_names_from_files_do_nothing(report_run):
    subject = subjects(report_run)[0]
    evil = "</script><script>document.title='evil'</script>"
    subject.predicted.uns[contract.GENAR][contract.SECTION] = evil
    subject.predicted.obs_names = [evil, *subject.predicted.obs_names[1:]]
    subject = Subject(subject.predicted)
    subject.predicted.var_names = [evil, *subject.predicted.var_names[1:]]
    html = page_html(subject)
    assert evil not in html
    assert payload_of(html)["genes"][0] == evil
    nonces = set(re.findall(r'nonce="([^"]+)"', html))
    assert len(nonces) == 1
    assert f"script-src 'nonce-{nonces.pop()}'" in html


def test_colour_bars_have_titles_from_the_start(report_run):
    """Bokeh leaves no room for a title that comes later."""
    made = spot_maps(subjects(report_run)[0].predicted, PANELS)
    bars = [bar for plot in made.values() for bar in plot.below if isinstance(bar, ColorBar)]
    assert len(bars) == len(PANELS)
    assert all(bar.title for bar in bars)


def test_what_a_model_does_not_draw_is_left_out_of_how_it_decodes(report_run):
    subject = subjects(report_run)[0]
    assert "<dt>decoding</dt><dd>greedy, 2 trajectories, seed 0</dd>" in page_html(subject)
    made = subject.predicted.uns[contract.GENAR]["prediction"]
    subject.predicted.uns[contract.GENAR]["prediction"] = {"model": "ridge", "decode": "mean", "layers": made["layers"]}
    assert "<dt>decoding</dt><dd>mean</dd>" in page_html(subject)


def test_a_large_section_stays_below_15_mb(report_run, tmp_path):
    """4,000 spots and 200 genes, with every layer and the truth."""
    small = subjects(report_run)[0]
    spots = np.arange(4000) % small.predicted.n_obs
    random = np.random.default_rng(0)
    mean = random.gamma(2, 20, size=(4000, 200))
    low, high = random.poisson(mean), random.poisson(mean) + 30
    predicted = anndata.AnnData(random.poisson(mean).astype(np.float32), layers={"mean": mean, "q05": low, "q95": high})
    predicted.layers["p_zero"] = np.exp(-mean)
    predicted.obsm["spatial"] = small.predicted.obsm["spatial"][spots] + random.random((4000, 2))
    predicted.uns = small.predicted.uns
    subject = Subject(predicted, predicted.copy())
    path = write_page(subject, tmp_path / "large.html")
    assert path.stat().st_size < 15e6


def test_several_runs_make_an_index(report_run, tmp_path, monkeypatch, capsys):
    for name in ("first", "second <b>"):
        shutil.copytree(report_run, tmp_path / "runs" / name)
    assert run(monkeypatch, "report", tmp_path / "runs", "--out", tmp_path / "all.html") == 0
    html = (tmp_path / "all.html").read_text()
    assert "second &lt;b&gt;" in html
    assert html.count('src="data:image/png') == 3  # measured once, and the two runs
    for link in re.findall(r'href="([^"]+)"', html):
        assert (tmp_path / link).is_file(), link
    assert "all_second-b_SIM2.html" in html
    assert run(monkeypatch, "report", tmp_path / "runs", "--out", tmp_path / "all.html", "--gene", "NONE") == 2
    assert "no prediction of section SIM2 has it" in capsys.readouterr().err


def test_the_index_of_a_bench_calls_its_methods_by_name(report_run, tmp_path, monkeypatch):
    for name in ("genar-0a1b/SIM2-1", "ridge-2c3d/SIM2-1"):
        shutil.copytree(report_run, tmp_path / "bench" / "runs" / name)
    table = "method,fold,seed,folder\nGenAR <i>,SIM2,1,genar-0a1b/SIM2-1\nridge,SIM2,,ridge-2c3d/SIM2-1\n"
    (tmp_path / "bench" / "runs.csv").write_text(table)
    for source in (tmp_path / "bench", tmp_path / "bench" / "runs"):
        assert run(monkeypatch, "report", source, "--out", tmp_path / "all.html") == 0
        cards = re.findall(r'<h3><a href="[^"]+">([^<]+)</a>', (tmp_path / "all.html").read_text())
        assert cards == ["GenAR &lt;i&gt;, seed 1", "ridge"]


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], ["run", "--out", "x.txt"]])
def test_bad_input_is_told_in_a_line(words, report_run, tissue, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    places = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty", "run": report_run}
    words = [places.get(word, word.format(tissue=tissue)) for word in words]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "report", *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_a_prediction_without_positions_is_refused(tmp_path):
    anndata.AnnData(np.ones((2, 2), np.float32)).write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(InputError, match="not a prediction"):
        write_report(tmp_path / "bare.h5ad", tmp_path / "page.html")


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
