"""The pages: every command of theirs is one that the command line knows, and the tutorials run as they stand."""

import glob
import json
import re
import shlex
import shutil
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import typer
from anndata import read_h5ad

import genar
from commands import run, sets
from genar.cli import app
from genar.data.simulate import TissueConfig, write_tissue
from genar.features import Inputs
from genar.models import Decoding, model_class, model_names
from genar.training import TrainConfig
from pages import DOCS, run_page

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WALKED = [
    "tutorials/train.md",
    "tutorials/bare_slide.md",
    "tutorials/compare.md",
    "tutorials/uncertainty.md",
    "howto/own_model.md",
    "howto/own_encoder.md",
]


def commands():
    """(page, line) of every `genar …` in the pages' shell blocks, and of those inline that name a command."""
    for page in PAGES:
        if "_build" in page.parts:
            continue
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for start in ("genar", "genar.cli"):
                    if start in words[:6]:
                        yield page.relative_to(ROOT), words[words.index(start) + 1 :]


def test_there_are_commands_to_check():
    assert len(list(commands())) > 40


@pytest.mark.parametrize(("page", "words"), commands())
def test_every_command_of_the_pages_parses(page, words):
    words = words[: words.index(">")] if ">" in words else words
    group = typer.main.get_command(app)
    try:
        command = group.commands[words[0]]
        command.make_context(words[0], list(words[1:]))
    except click.exceptions.Exit:  # --help
        pass
    except (KeyError, click.exceptions.ClickException) as error:
        raise AssertionError(f"{page}: genar {' '.join(words)}: {error!r}") from error


@pytest.mark.parametrize("name", WALKED)
def test_a_page_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    run_page(name, shell(monkeypatch))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def real_sections(shared, tmp_path_factory):
    """A window of two HER2ST sections, about a quarter of their spots, in the layout of HEST-1k."""
    folder, size_px, margin_px = tmp_path_factory.mktemp("real"), 2800, 300
    for kind in ("st", "wsis", "metadata"):
        (folder / kind).mkdir()
    for name in ("SPA138", "SPA139"):
        section = read_h5ad(shared / "data" / "her2st" / "st" / f"{name}.h5ad")
        x, y = corner = np.median(section.obsm["spatial"], axis=0).astype(int) - size_px // 2
        at = section.obsm["spatial"] - corner
        section = section[((at > margin_px) & (at < size_px - margin_px)).all(1)].copy()
        section.obsm["spatial"] = section.obsm["spatial"] - corner
        section.uns.clear()
        section.write_h5ad(folder / "st" / f"{name}.h5ad")
        image = shared / "data" / "her2st" / "wsis" / f"{name}.tif"
        write_window(image, x, y, size_px, folder / "wsis" / f"{name}.tif")
        shutil.copy(shared / "data" / "her2st" / "metadata" / f"{name}.json", folder / "metadata")
    return folder


def write_window(image, x, y, size_px, path):
    """A square of an image, with its pixel size."""
    with tifffile.TiffFile(image) as file:
        page = file.pages.first
        window = page.asarray()[y : y + size_px, x : x + size_px]
    tags = {"resolution": page.resolution, "resolutionunit": page.resolutionunit}
    tifffile.imwrite(path, window, tile=(256, 256), photometric="rgb", **tags)


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in WALKED if name.startswith("tutorials/")])
def test_a_tutorial_runs_on_real_sections(name, real_sections, store, tmp_path, monkeypatch):
    """On two HER2ST sections in place of the simulated ones, whose pixels are of 2 um; embedded once for all."""
    (tmp_path / "store").symlink_to(store, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    link_sections(real_sections, tmp_path / "sections", {"A": "SPA138", "B": "SPA139"})
    monkeypatch.setattr(genar, "write_tissue", lambda *_, **__: None)
    run_page(name, shell(monkeypatch, mpp="0.69"))


def shell(monkeypatch, mpp="2.0"):
    """Runs a block of ``genar`` commands."""

    def run_block(block):
        for line in block.replace("\\\n", " ").replace("--mpp 2.0", f"--mpp {mpp}").splitlines():
            words = [found for word in shlex.split(line, comments=True) for found in glob.glob(word) or [word]]
            assert words[0] == "genar"
            assert run(monkeypatch, *words[1:]) == 0, line

    return run_block


def link_sections(there, folder, names):
    """Sections under other names, in the layout of HEST-1k."""
    for name, real in names.items():
        for kind, suffix in (("st", ".h5ad"), ("wsis", ".tif"), ("metadata", ".json")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{name}{suffix}").symlink_to(there / kind / f"{real}{suffix}")


# Commands that are run, with settings of a size for tests behind those that train; in this order, in one folder.
RUN = ["README.md", "docs/evaluation.md", "docs/report.md", "docs/other_programs.md", "docs/start.md"]
TINY = ("width=16", "depth=1", "heads=2", "max_count=255", "max_epochs=1")
SMALL = ["--n-genes", "80", "--views", "1", "--samples", "2", *sets(*TINY)]
ELSEWHERE = {
    r"^make ": "the Makefile runs this test",
    r"^pip install": "the workflow installs the package",
    r"^genar demo$": "the test below, on a smaller tissue",
}
if find_spec("vitessce") is None:
    ELSEWHERE[r"--format vitessce"] = "needs the extra vitessce, which the environment of the lowest versions has not"


def lines(page):
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        yield from (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())


@pytest.mark.parametrize("source", ["simulated", pytest.param("her2st", marks=pytest.mark.real)])
def test_the_commands_of_the_pages_run(source, tmp_path, monkeypatch, request):
    """On sections of the names that the pages use, simulated or real, and a slide without counts."""
    monkeypatch.chdir(tmp_path)
    tissue = TissueConfig(n_rows=6, n_cols=6, n_genes=120, counts_per_nucleus=20)
    if source == "simulated":
        write_tissue(tmp_path / "her2st", ("SPA138", "SPA139"), config=tissue)
        panel = SMALL[:2]
    else:
        there = request.getfixturevalue("real_sections")
        link_sections(there, tmp_path / "her2st", {name: name for name in ("SPA138", "SPA139")})
        # so few spots would not choose the genes that the pages name
        section = read_h5ad(there / "st" / "SPA139.h5ad")
        genes = section.var_names[np.argsort(-np.asarray(section.X.sum(axis=0)).ravel())]
        Path("genes.txt").write_text("\n".join(list(dict.fromkeys(["COL1A1", "CD74", *genes]))[:80]))
        panel = ["--panel", "genes.txt"]
    write_tissue(tmp_path / "sections", ("ID", "OTHER"), config=tissue)
    # a slide without counts
    write_window(tmp_path / "her2st" / "wsis" / "SPA139.tif", 800 * (source == "her2st"), 0, 1200, "slide.svs")
    ran = []
    for page in RUN:
        for line in lines(page):
            if any(re.search(pattern, line) for pattern in ELSEWHERE):
                continue
            words = shlex.split(line)
            assert words[0] == "genar", line
            if words[1] in ("train", "evaluate"):  # the page before may have made this folder
                shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
            chosen = panel if "her2st" in words else SMALL[:2]
            more = [*chosen, *SMALL[2:]] if words[1] == "train" else []
            assert run(monkeypatch, *words[1:], *more) == 0, line
            ran.append(words[1])
            if "pred.h5ad" in words and words[1] == "predict":
                shutil.copy("pred.h5ad", "rival.h5ad")
    assert set(ran) == {"check", "train", "predict", "evaluate", "report", "export"}
    assert len(ran) > 15


def test_the_demo_runs(tmp_path, monkeypatch, capsys):
    """As ``genar demo`` does, on a smaller tissue."""
    from genar import demo

    monkeypatch.setattr(demo, "TISSUE", TissueConfig(n_rows=4, n_cols=4, n_genes=120, counts_per_nucleus=20))
    monkeypatch.setattr(demo, "N_GENES", 20)
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "demo") == 0
    told = capsys.readouterr().out
    assert "not a result on patients" in told
    assert str(Path("genar-demo/report.html")) in told
    assert "</html>" in Path("genar-demo/report.html").read_text()
    assert json.loads(Path("genar-demo/run/metrics.json").read_text())["SIM2"].keys() >= {"genar", "mean", "ridge"}
    assert read_h5ad("genar-demo/run/predictions/SIM2.h5ad").n_vars == 20


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        if "_build" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_page_is_in_the_contents():
    contents = (DOCS / "index.md").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS).with_suffix(""))
        if name != "index" and "_build" not in page.parts:
            assert re.search(rf"^{re.escape(name)}$", contents, re.MULTILINE), f"{name} is not in docs/index.md"


@pytest.mark.parametrize(("page", "tables"), [("settings", "setting_tables"), ("commands", "command_tables")])
def test_the_tables_of_a_page_are_those_of_the_code(page, tables, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import generated

    there = (DOCS / f"{page}.md").read_text()
    copy = tmp_path / "page.md"
    copy.write_text(there)
    generated.renew(copy, getattr(generated, tables)())
    assert copy.read_text() == there, f"docs/{page}.md is not of this code; `make docs` writes it anew"


def test_every_setting_is_on_its_page(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import generated

    page = (DOCS / "settings.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].strip("| `"): row for row in rows}
    for owner in (TrainConfig, Decoding, Inputs):
        assert {f.name for f in fields(owner)} <= set(told)
    for name in model_names():
        assert set(model_class(name).settings_types()) <= set(told)
    assert set(model_class("genar").settings_types()).isdisjoint(generated.BY_DATA)
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []  # each says what it is
    assert told["widths_um"][1:3] == ["[112.0, 309.0]", "[]"]
    assert told["warmup_steps"][1:3] == ["20", "0"]
