"""``genar check``: what it tells of sections, refuses, and draws."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pytest
import zarr
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from commands import run
from genar import _console
from genar.data import contract, open_slide, read_section
from genar.data.tissue import tissue_of
from genar.report import maps
from genar.report.sections import CheckResult, check_sections, name_genes

TINY = ("--n-genes", 20, "--views", 1, "--encoder", "genar.bench.toy:narrow_encoder")


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "hest")


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    def checked(*words):
        code = run(monkeypatch, "check", *words, "--out", tmp_path / "overlays", "--json")
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]), said.err

    return checked


def test_check_tells_what_is_there(folder, check, tmp_path):
    code, told, _ = check(folder)
    assert (code, told["status"], told["faults"]) == (0, "done", [])
    row, truth = told["sections"][0], anndata.read_h5ad(folder / "st" / "A.h5ad")
    assert (row["section"], row["format"], row["patient"]) == ("A", "simulated", "Simulated A")
    assert (row["n_spots"], row["n_genes"]) == truth.shape
    sizes = np.asarray(truth.X.sum(axis=1)).ravel()
    assert row["library_size"] == {"min": sizes.min(), "median": np.median(sizes), "max": sizes.max()}
    assert row["mpp_by"] == pytest.approx({"metadata": 0.7, "pitch": 0.7, "image": 0.7}, rel=1e-3)
    assert (row["mpp_agree"], row["raw_counts"], row["counts_from"]) == (True, True, "X")
    assert (row["n_outside_image"], row["n_off_tissue"]) == (0, 0)
    assert (row["gene_names"], row["species"]) == ("symbols", "human")
    with Image.open(tmp_path / "overlays" / "A.png") as overlay:
        assert min(overlay.size) > 400


def edit(folder, change, section="A"):
    path = folder / "st" / f"{section}.h5ad"
    adata = anndata.read_h5ad(path)
    changed = change(adata)
    (adata if changed is None else changed).write_h5ad(path)


def test_every_section_is_checked_when_one_fails(folder, check):
    edit(folder, lambda adata: setattr(adata, "X", adata.X.log1p()))
    code, told, err = check(folder)
    assert (code, told["status"]) == (2, "wrong input")
    bad, good = told["sections"]
    assert bad["raw_counts"] is False
    assert "log-transformed" in bad["faults"][0]
    assert good["faults"] == []
    assert good["overlay"].endswith("B.png")
    assert [line for line in err.splitlines() if line.startswith("error")] == [f"error: {bad['faults'][0]}"]


def test_pixel_sizes_that_differ_are_a_warning_with_both_values(folder, check):
    path = folder / "metadata" / "A.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pixel_size_um_estimated": 0.8}))
    code, told, err = check(folder)
    assert code == 0
    assert told["sections"][0]["mpp_agree"] is False
    assert "0.8000 um by the metadata, 0.7000 um by the spot pitch" in err


def zero_spots(adata):
    return adata[:0].copy()


def twice(adata):
    adata.obs_names = [adata.obs_names[1], *adata.obs_names[1:]]


def one_place(adata):
    adata.obsm["spatial"] = np.full((adata.n_obs, 2), 50.0)


def outside(adata):
    adata.obsm["spatial"] = adata.obsm["spatial"] + 1e5


def with_value(value):
    def change(adata):
        x = adata.X.toarray().astype(np.float32)
        x[0, 0] = value
        adata.X = x

    return change


REFUSED = {
    "at least one spot": zero_spots,
    "occurs more than once": twice,
    "at the same point": one_place,
    "outside the image": outside,
    "fractional": with_value(0.5),
    "negative": with_value(-2),
    "NaN or infinite": with_value(np.inf),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("says", REFUSED)
def test_what_a_run_would_refuse_is_exit_code_2(says, folder, check):
    edit(folder, REFUSED[says])
    code, told, err = check(f"{folder}:A")
    assert code == 2
    assert len(told["faults"]) == 1
    assert says in told["faults"][0]
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_images_are_exit_code_2(damage, folder, check):
    path = folder / "wsis" / "A.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"no image")
    code, told, _ = check(f"{folder}:A")
    assert code == 2
    assert "A.tif" in told["faults"][0]


def test_without_any_pixel_size_mpp_is_asked_for(folder, check):
    for name in ("metadata", "wsis"):
        shutil.rmtree(folder / name)
    code, told, _ = check(f"{folder}:A")
    assert code == 2
    assert "--mpp" in told["faults"][0]
    code, told, _ = check(f"{folder}:A", "--mpp", "0.7")
    assert code == 0
    assert "no image" in told["sections"][0]["note"]


def test_panel_and_features_are_looked_for(folder, check, tmp_path):
    genes = list(anndata.read_h5ad(folder / "st" / "A.h5ad").var_names)
    (tmp_path / "panel.txt").write_text(f"{genes[0]}\nNOSUCHGENE\n")
    names = list(anndata.read_h5ad(folder / "st" / "A.h5ad").obs_names)
    for digest, spots in (("1", names), ("2", names[:-1])):
        group = zarr.open_group(tmp_path / "store" / f"A-{digest}.zarr", mode="w")
        group.create_array("barcode", shape=(len(spots),), dtype="string")[:] = np.array(spots, object)
        group.attrs.update({"encoder": "resnet18", "section": "A"})
    words = ("--panel", tmp_path / "panel.txt", "--features", tmp_path / "store")
    code, told, _ = check(f"{folder}:A", *words)
    row = told["sections"][0]
    assert code == 2
    assert (row["features"], row["panel_missing"]) == (["resnet18"], ["NOSUCHGENE"])
    assert len(row["faults"]) == 1  # a store of other spots is none
    assert "1 of 2 panel genes missing (NOSUCHGENE)" in row["faults"][0]


def test_duplicates_and_patients_across_folders_are_told(folder, two, check, tmp_path):
    (folder / "st" / "B.h5ad").rename(folder / "st" / "C.h5ad")
    for kind in ("wsis", "metadata"):
        suffix = {"wsis": "tif", "metadata": "json"}[kind]
        (folder / kind / f"B.{suffix}").rename(folder / kind / f"C.{suffix}")
    code, told, _ = check(folder, two)
    assert code == 0
    assert any(line.startswith("the same id 2 times: A in") for line in told["duplicates"])
    assert any("the same counts 2 times: C in" in line and "B in" in line for line in told["duplicates"])
    assert any(line.startswith("patient Simulated A is in 2 folders") for line in told["duplicates"])
    assert sorted(p.name for p in (tmp_path / "overlays").iterdir()) == ["A.png", "A_2.png", "B.png", "C.png"]


def test_spots_off_the_tissue_are_counted(folder, check):
    def to_the_corner(adata):
        adata.obsm["spatial"] = adata.obsm["spatial"] / 20

    edit(folder, to_the_corner)
    code, told, err = check(f"{folder}:A")
    assert code == 0
    assert told["sections"][0]["n_off_tissue"] > told["sections"][0]["n_spots"] / 2
    assert "do coordinates and image belong together" in err


def test_check_loads_no_torch_and_prints_a_table(folder, tmp_path):
    code = (
        "import sys; from genar import cli\n"
        f"sys.argv = ['genar', 'check', {str(folder)!r}, '--out', {str(tmp_path / 'o')!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print('heavy:', [name for name in ('torch', 'scanpy', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "simulated" in done.stdout
    assert "ok" in done.stdout


@pytest.mark.parametrize("offset", [0, 300, -500, 1e5])
def test_the_scale_bar_lies_on_the_image_and_every_spot_on_the_map(offset, folder):
    section = read_section(f"{folder}:A")
    section.obsm["spatial"] = section.obsm["spatial"] + offset
    size = open_slide(folder / "wsis" / "A.tif").size_px
    axis = Figure().subplots()
    maps._draw_tissue(axis, section, (np.zeros((10, 10, 3), np.uint8), size))
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    xy = section.obsm["spatial"]
    assert (xy > [left, top]).all()
    assert (xy < [right, bottom]).all()
    (bar,) = axis.lines
    ends = np.stack(bar.get_data(), axis=1)
    low, high = ([0, 0], size) if offset < 1e4 else ([left, top], [right, bottom])
    assert (ends > low).all()
    assert (ends < high).all()


@pytest.mark.parametrize("plain", [False, True])
def test_the_overlay_shows_the_tissue_near_the_spots_at_1000_px(plain, folder):
    slide = folder / "wsis" / "A.tif"
    if plain:
        with_pixels = open_slide(slide)
        Image.fromarray(with_pixels.thumbnail(5000)).save(slide.with_suffix(".png"))
        slide.unlink()
    section = read_section(f"{folder}:A")
    view, mask, size, _ = tissue_of(contract.slide_path(section), contract.mpp(section))
    seen, (left, right, bottom, top) = maps._closeup(section, (view, mask, size), np.array([-20.0, 0, 500, 400]))
    assert (left, right, bottom, top) == (0, 500, 400, 0)
    assert abs(seen.shape[1] - 500) <= 1  # no finer than the slide
    whole = open_slide(contract.slide_path(section)).thumbnail(5000)[:400, :500]
    rows = (2 * np.arange(400) + 1) * mask.shape[0] // (2 * size[1])  # of the middles of pixels
    cols = (2 * np.arange(500) + 1) * mask.shape[1] // (2 * size[0])
    tissue = mask[rows[:, None], cols]
    np.testing.assert_array_equal(seen[tissue], whole[tissue])
    assert seen[~tissue].mean() < 0.6 * whole[~tissue].mean()


def test_the_table_names_the_source_of_every_pixel_size(folder, monkeypatch):
    monkeypatch.setattr(_console, "console", Console(width=140, record=True, file=io.StringIO()))
    (folder / "st" / "A.h5ad").write_bytes(b"no section")
    rows = check_sections([str(folder)]).sections
    rows.append(replace(rows[1], section="C", mpp_by={}))
    _console.show(_console.check_table(CheckResult(rows, [], [])))
    lines = [[cell.strip() for cell in line.split("│")] for line in _console.console.export_text().splitlines()]
    by = [cells[7] for cells in lines if len(cells) > 7]
    assert by == ["-", "metadata 0.700", "pitch 0.700", "image 0.700", "--mpp", *by[5:]]
    assert not any(by[5:])


@pytest.mark.parametrize(
    ("names", "ids", "expected"),
    [
        (["KRT8", "C1orf159", "HLA-A", "B2M", "MT-CO1"], None, ("symbols", "human")),
        (["Krt8", "mt-Co1", "B2m", "Erbb2", "Actb", "Ywhah", "Gapdh"], None, ("symbols", "mouse")),
        (["ENSG00000141736", "ENSG00000141736.5"], None, ("Ensembl", "human")),
        (["A", "B"], ["ENSMUSG00000020473"] * 2, ("symbols", "mouse")),
        (["ENSG00000141736", "KRT8"], None, ("mixed", "human")),
    ],
)
def test_gene_names_and_species(names, ids, expected):
    assert name_genes(names, ids) == expected


def test_check_takes_bare_slides(two, check, tmp_path):
    code, told, _ = check(two / "wsis")
    assert code == 0
    assert [row["format"] for row in told["sections"]] == ["slide", "slide"]
    assert all(row["n_genes"] == 0 and row["n_spots"] > 10 and row["overlay"] for row in told["sections"])


def test_check_lists_the_stores_of_these_spots_alone(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "tissue", tmp_path / "tissue")
    for part in ("st", "wsis", "metadata"):
        for path in (tmp_path / "tissue" / part).glob("S2.*"):
            path.rename(path.with_name(f"S1-2{path.suffix}"))
    words = ("check", tmp_path / "tissue", "--out", tmp_path / "overlays", "--json", "--features")
    store = tmp_path / "store"
    run(monkeypatch, "features", tmp_path / "tissue", "--out", store, *TINY[2:], "--widths-um", 112)
    for path in store.glob("S1-[!2]*"):  # of S1 there is none
        shutil.rmtree(path)
    capsys.readouterr()
    assert run(monkeypatch, *words, store) == 0
    rows = json.loads(capsys.readouterr().out)["sections"]
    assert {row["section"]: len(row["features"]) for row in rows} == {"S1": 0, "S1-2": 1}
    assert run(monkeypatch, *words, tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().out


def test_overlays_of_sections_of_one_name_are_all_named(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "tissue", tmp_path / "again")
    assert run(monkeypatch, "check", home / "tissue", tmp_path / "again", "--out", tmp_path / "o", "--json") == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert sorted(outputs) == ["overlay S1", "overlay S1_2", "overlay S2", "overlay S2_2"]
