"""Bare slides: an image and no counts. Tissue is found and spots are laid on a grid over it (``genar.data.tissue``)."""

from collections import Counter
from pathlib import Path

from anndata import AnnData

from genar.data.door import number, read_json
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
    mpp = options.mpp or _mpp_of_hest(path)
    return place_spots(path, spacing_um=options.spacing_um, spot_um=options.spot_um, mpp=mpp, section=name)


def _mpp_of_hest(slide: Path) -> float | None:
    """Pixel size by the metadata beside a slide in HEST's layout, whose TIFFs say a tenth of it in their tags."""
    folder = slide.absolute().parent  # named from within the folder, too
    path = folder.parent / "metadata" / f"{slide.stem}.json"
    if folder.name != "wsis" or not path.is_file():
        return None
    facts = read_json(path, "JSON, the sample's row of the HEST table")
    return number(path, "pixel_size_um_estimated", facts.get("pixel_size_um_estimated")) or None
