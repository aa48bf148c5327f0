"""HER2ST from its authors' repository: the raw legacy files, and their conversion into HEST-1k layout.

Differences from the files that the hub holds: the pixel size is a fit to all spots, where HEST's comes from one or two
pairs of them (up to 3 % apart); slides are JPEG-compressed pyramids; ``obs`` has no quality-control columns. Counts,
names and positions are the same.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import numpy as np

import genar
from genar.data import contract, open_slide
from genar.data.datasets import dataset
from genar.data.files import replacing, write_text
from genar.data.formats import legacy_st
from genar.data.pyramid import write_pyramid
from genar.errors import InputError
from genar.fetch.transfer import GIT, Access, RemoteFile, check_url, read_json

REPOSITORY = "almaan/her2st"
PAGE = f"https://github.com/{REPOSITORY}"
LICENCE = "no licence file; the HEST table gives CC BY 4.0"
DEFAULT_REVISION = "85df7411b987a7dec3feff9718b869a7a82091ec"
_API, _RAW = "https://api.github.com", "https://raw.githubusercontent.com"
_DOWNSCALED_PX = 1000


def list_files(sections: Iterable[str], revision: str | None = None) -> tuple[dict[str, list[RemoteFile]], Access]:
    """Section -> its three raw files (counts, spots under tissue, image), paths as below the repository's ``data/``.

    ``GENAR_GITHUB_API`` and ``GENAR_GITHUB_RAW`` name mirrors. Raises ``InputError`` where GitHub is out of reach, the
    revision is unknown, or a section's files are not there.
    """
    revision = revision or DEFAULT_REVISION
    named = (os.environ.get(f"GENAR_GITHUB_{kind}", url) for kind, url in (("API", _API), ("RAW", _RAW)))
    api, raw = (check_url(url.rstrip("/")) for url in named)
    access = Access({"User-Agent": f"genar/{genar.__version__}"}, f"is {PAGE} still public?")
    what = f"{REPOSITORY} at {revision}"
    tree = read_json(f"{api}/repos/{REPOSITORY}/git/trees/{revision}?recursive=1", access, what)
    try:
        entries = {e["path"]: e for e in tree["tree"] if e["type"] == "blob"}
        blobs = {path: (int(e["size"]), str(e["sha"])) for path, e in entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{what}: {api} answered no list of files; is GENAR_GITHUB_API right?") from error

    def remote(path: str) -> RemoteFile:
        size, sha = blobs[path]
        return RemoteFile(
            path.removeprefix("data/"), f"{raw}/{REPOSITORY}/{revision}/{quote(path)}", size, f"{GIT}:{sha}"
        )

    return {section: [remote(path) for path in _paths(section, list(blobs), what)] for section in sections}, access


def _paths(section: str, paths: list[str], what: str) -> list[str]:
    name = dataset("her2st").names[section]
    images = [p for p in paths if p.startswith(f"data/ST-imgs/{name[0]}/{name}/") and p.lower().endswith(".jpg")]
    wanted = [f"data/ST-cnts/{name}.tsv.gz", f"data/ST-spotfiles/{name}_selection.tsv", *images]
    if len(images) != 1 or not set(wanted) <= set(paths):
        found = [path for path in wanted if path in paths]
        raise InputError(
            f"{what}: expected counts, spots and one image of {name} ({section}), found {', '.join(found) or 'none'}; "
            "name another --revision"
        )
    return wanted


def outputs(section: str) -> list[str]:
    """The files that a converted section consists of, the counts last."""
    return [f"metadata/{section}.json", f"wsis/{section}.tif", f"st/{section}.h5ad"]


def convert(raw: Path, section: str, out: Path) -> list[str]:
    """Turn the raw files of ``section`` in ``raw`` (as the repository's ``data/``) into HEST-1k layout in ``out``.

    Returns :func:`outputs`; each appears whole or not at all. Raises ``InputError`` where a raw file is missing or is
    not what it should be.
    """
    data = dataset("her2st")
    name = data.names[section]
    counts, selection = raw / "ST-cnts" / f"{name}.tsv.gz", raw / "ST-spotfiles" / f"{name}_selection.tsv"
    images = sorted((raw / "ST-imgs" / name[0] / name).glob("*.jpg"))
    if len(images) != 1:
        raise InputError(f"{raw}/ST-imgs/{name[0]}/{name}: expected one .jpg, found {len(images)}; fetch {name} anew")
    adata = legacy_st.read_files(counts, selection, images[0], section=section, patient=data.patients[section])
    slide = open_slide(images[0])
    overview, size_px = slide.thumbnail(_DOWNSCALED_PX), slide.size_px
    with replacing(out / "wsis" / f"{section}.tif") as path:
        write_pyramid(path, slide.thumbnail(max(size_px)), contract.mpp(adata))
    slide.close()
    write_text(out / "metadata" / f"{section}.json", json.dumps(_metadata(adata, name, size_px), indent=2) + "\n")
    with replacing(out / "st" / f"{section}.h5ad") as path:
        _hest_form(adata, overview, size_px).write_h5ad(path, compression="gzip")
    return outputs(section)


def _hest_form(adata, overview: np.ndarray, size_px: tuple[int, int]):
    """The section with the slots that the HEST library writes."""
    xy = contract.coords_px(adata)
    adata.obs = adata.obs[["array_row", "array_col"]].assign(
        pxl_row_in_fullres=xy[:, 1], pxl_col_in_fullres=xy[:, 0], in_tissue=True
    )
    scale = max(overview.shape) / max(size_px)
    diameter_px = legacy_st.SPOT_UM / contract.mpp(adata)
    factors = {"spot_diameter_fullres": diameter_px, "tissue_downscaled_fullres_scalef": scale}
    adata.uns = {contract.SPATIAL: {"ST": {"images": {"downscaled_fullres": overview}, "scalefactors": factors}}}
    return adata


def _metadata(adata, name: str, size_px: tuple[int, int]) -> dict:
    """The section's row of the HEST table, as far as the raw files and the paper tell it."""
    section, data = contract.name(adata), dataset("her2st")
    return {
        "dataset_title": "Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated cell type "
        "interactions",
        "id": section,
        "image_filename": f"{section}.tif",
        "organ": "Breast",
        "disease_state": "Cancer",
        "species": data.species,
        "patient": data.patients[section],
        "st_technology": data.technology,
        "license": "Creative Commons Attribution 4.0 International",
        "study_link": "https://pubmed.ncbi.nlm.nih.gov/34650042/",
        "download_page_link1": PAGE,
        "inter_spot_dist": legacy_st.PITCH_UM,
        "spot_diameter": legacy_st.SPOT_UM,
        "spots_under_tissue": adata.n_obs,
        "nb_genes": adata.n_vars,
        "pixel_size_um_embedded": None,
        "pixel_size_um_estimated": contract.mpp(adata),
        "fullres_px_width": size_px[0],
        "fullres_px_height": size_px[1],
        "subseries": name,
        "note": f"converted by genar {genar.__version__}; {adata.uns[contract.GENAR].get('note') or 'no spot dropped'}",
    }
