"""Raw files of HER2ST from GitHub, made into sections."""

import gzip
import json
import os
import re

import anndata
import numpy as np
import pytest
from PIL import Image

from genar.data import open_slide, read_sections
from genar.fetch import her2st
from source_server import FIRST, left


def raw_files(tissue):
    """A simulated section as the raw files of H3 (SPA119), with one selected spot that has no counts."""
    section = read_sections(tissue)[0]
    genes, xy = list(section.var_names), section.obsm["spatial"]
    array = np.rint((xy - xy.min(axis=0)) / (section.uns["genar"]["pitch_um"] / section.uns["genar"]["mpp"])).astype(
        int
    )
    names = [f"{5 + x}x{7 + y}" for x, y in array]
    rows = ["\t".join([name, *map(str, row)]) for name, row in zip(names, section.X.toarray().astype(int), strict=True)]
    spots = [
        "\t".join(map(str, (*name.split("x"), *(float(v) + 0.01 for v in name.split("x")), *at, 1)))
        for name, at in zip([*names, "30x30"], [*xy, (10.0, 10.0)], strict=True)
    ]
    slide = open_slide(tissue / "wsis/SIM1.tif")
    Image.fromarray(slide.thumbnail(max(slide.size_px))).save(tissue.parent / "H3.jpg", quality=90)
    return {
        "data/ST-cnts/H3.tsv.gz": gzip.compress("\n".join(["\t".join(["", *genes]), *rows]).encode()),
        "data/ST-spotfiles/H3_selection.tsv": "\n".join(
            ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected", *spots]
        ).encode(),
        "data/ST-imgs/H/H3/a slide.jpg": (tissue.parent / "H3.jpg").read_bytes(),
        "README.md": b"",
    }


def test_fetch_from_github(source, fetch_, tissue, tmp_path):
    source.github = raw_files(tissue)
    image = "data/ST-imgs/H/H3/a slide.jpg"
    source.faults[image] = [("drop", 5000), ("none", 0)]
    code, _, told = fetch_("--source", "github", "--json", sections="H3")
    assert code == 0
    out = tmp_path / "out"
    assert left(out) == ["fetch.json", *her2st.outputs(FIRST)[:1], f"st/{FIRST}.h5ad", f"wsis/{FIRST}.tif"]
    assert [asked[1] for asked in source.requests(image)] == [None, "bytes=5000-"]
    assert json.loads(told.splitlines()[-1])["revision"] == her2st.DEFAULT_REVISION
    (read,), original = read_sections(out), read_sections(tissue)[0]
    assert re.fullmatch(r"0\d\dx0\d\d", read.obs_names[0])
    np.testing.assert_array_equal(read.X.toarray(), original.X.toarray())
    np.testing.assert_allclose(read.obsm["spatial"], original.obsm["spatial"])
    assert (read.uns["genar"]["patient"], read.uns["genar"]["pitch_um"]) == ("Patient H", 200)
    ours, theirs = open_slide(out / f"wsis/{FIRST}.tif"), open_slide(tissue / "wsis/SIM1.tif")
    assert ours.size_px == theirs.size_px
    assert ours.mpp == pytest.approx(read.uns["genar"]["mpp"], rel=1e-4)
    # again: nothing is fetched or made anew
    before = {path: os.stat(out / path).st_mtime_ns for path in her2st.outputs(FIRST)}
    source.asked.clear()
    assert fetch_("--source", "github", sections="H3")[0] == 0
    assert [asked[0] for asked in source.asked] == ["tree"]
    assert before == {path: os.stat(out / path).st_mtime_ns for path in before}
    # another revision's counts: made anew
    source.github["data/ST-cnts/H3.tsv.gz"] += gzip.compress(b"\n")
    assert fetch_("--source", "github", sections="H3")[0] == 0
    assert before != {path: os.stat(out / path).st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("data/ST-imgs/H/H3/a slide.jpg", "expected counts, spots and one image of H3 (SPA119), found data/ST-cnts"),
        ("data/ST-cnts/H3.tsv.gz", "found data/ST-spotfiles/H3_selection.tsv"),
    ],
)
def test_github_without_a_file(source, fetch_, tissue, tmp_path, path, says):
    source.github = raw_files(tissue)
    del source.github[path]
    code, line, _ = fetch_("--source", "github", sections=FIRST)
    assert (code, says in line) == (2, True)
    assert not (tmp_path / "out").exists()


def test_github_at_its_limit(source, fetch_, tissue):
    source.faults["tree"] = [("status", (403, {"X-RateLimit-Remaining": "0"}))]
    code, line, _ = fetch_("--source", "github", sections=FIRST)
    assert (code, "allows no more requests from this address for now" in line) == (2, True)


def test_a_raw_file_that_is_no_table(source, fetch_, tissue, tmp_path):
    source.github = {**raw_files(tissue), "data/ST-spotfiles/H3_selection.tsv": b"a\tb\n1\t2\n"}
    code, line, _ = fetch_("--source", "github", sections=FIRST)
    assert (code, "expected columns x, y, pixel_x, pixel_y" in line) == (2, True)
    assert not [path for path in left(tmp_path / "out") if not path.startswith(".fetch/")]


@pytest.mark.real
def test_raw_files_become_the_hubs_sections(source, fetch_, shared, tmp_path):
    raw, theirs = shared / "data/her2st/raw", anndata.read_h5ad(shared / "data/her2st/st/SPA139.h5ad")
    files = ["ST-cnts/C4.tsv.gz", "ST-spotfiles/C4_selection.tsv", "ST-imgs/C/C4/5714_HE_BT_D2.jpg"]
    source.github = {f"data/{path}": (raw / path).read_bytes() for path in files}
    assert fetch_("--source", "github", sections="C4")[0] == 0
    ours = anndata.read_h5ad(tmp_path / "out/st/SPA139.h5ad")
    assert list(ours.obs_names) == list(theirs.obs_names)
    assert list(ours.var_names) == list(theirs.var_names)
    assert (ours.X != theirs.X).nnz == 0
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    columns = ["array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres", "in_tissue"]
    assert ours.obs[columns].equals(theirs.obs[columns])
    table = json.loads((shared / "data/her2st/metadata/SPA139.json").read_text())
    made = json.loads((tmp_path / "out/metadata/SPA139.json").read_text())
    alike = ["id", "patient", "species", "st_technology", "organ", "subseries", "license", "fullres_px_width",
             "fullres_px_height", "spots_under_tissue", "nb_genes", "inter_spot_dist", "spot_diameter"]  # fmt: skip
    assert {key: made[key] for key in alike} == {key: table[key] for key in alike}
    assert made["pixel_size_um_estimated"] == pytest.approx(table["pixel_size_um_estimated"], rel=0.01)
    slide = tmp_path / "out/wsis/SPA139.tif"
    square = ((4500, 4500), 1000, 1000)
    before, after = (open_slide(path).read_patch_px(*square) for path in (raw / files[2], slide))
    assert np.abs(after.astype(int) - before).mean() < 1  # JPEG compressed once more
