"""Bare slides: an image and no counts. Tissue is found and spots are laid on a grid over it (``genar.data.tissue``)."""

from collections import Counter
from pathlib import Path

from anndata import AnnData

from genar.data import contract
from genar.data.formats import hest
from genar.data.patients import patient_in_table
from genar.data.reading import SLIDE_SUFFIXES, ReadOptions
from genar.data.tissue import place_spots
from genar.errors import InputError

NAME = "slide"
EXPECTED = f"slides without counts ({' '.join(SLIDE_SUFFIXES)})"
# Pictures that Space Ranger puts beside its counts: never slides of their own.
_PICTURES = (
    "tissue_hires_image",
    "tissue_lowres_image",
    "aligned_fiducials",
    "detected_tissue_image",
    "cytassist_image",
)


def sections(root: Path) -> list[str]:
    """Ids of the slides in ``root``."""
    return list(_slides(root))


def of_file(path: Path) -> tuple[Path, str] | None:
    """Folder and id of a slide."""
    return (path.parent, path.name) if path.suffix.lower() in SLIDE_SUFFIXES else None


def _slides(root: Path) -> dict[str, Path]:
    found = [p for p in root.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES and p.is_file()]
    found = [p for p in found if not p.name.startswith(".") and p.stem not in _PICTURES]
    times = Counter(p.stem for p in found)
    return {p.name if times[p.stem] > 1 else p.stem: p for p in found}


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Spots on the tissue of one slide: N spots x 0 genes, as the contract has it."""
    if options.image is not None:
        raise InputError(f"section {section}: --image names the image of counts, and this is an image itself")
    path = root / section if (root / section).is_file() else _slides(root)[section]
    name = section if section in _slides(root) else path.stem  # two may have one stem
    home = _in_hest(path)
    mpp = options.mpp or (hest.stated_mpp(home, path.stem) if home else None)
    spots = place_spots(
        path, spacing_um=options.spacing_um, spot_um=options.spot_um, hexagonal=options.hexagonal, mpp=mpp, section=name
    )
    spots.uns[contract.GENAR][contract.PATIENT] = patient(root, section)
    return spots


def patient(root: Path, section: str) -> str:
    """Who the slide is of, where it is one of HEST's layout: by the table or the metadata there."""
    path = root / section if (root / section).is_file() else _slides(root)[section]
    home = _in_hest(path)
    return patient_in_table(home, path.stem) or hest.patient(home, path.stem) if home else ""


def _in_hest(slide: Path) -> Path | None:
    """The folder in HEST's layout whose ``wsis`` holds the slide: its TIFFs say a tenth of the pixel size in their
    tags, its metadata the truth."""
    folder = slide.absolute().parent  # named from within the folder, too
    return folder.parent if folder.name == "wsis" else None
