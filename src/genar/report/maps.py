"""Static maps: spots coloured by counts over the H&E, truth beside prediction (as in the paper's figure 3)."""

import contextlib
import glob
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib import colormaps
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from genar.data import contract
from genar.data.files import MARK, file_part, replacing
from genar.data.slide import closeup, open_slide
from genar.errors import InputError

_BACKGROUND_PX = 1000
_COLOURS = "viridis"  # readable without colour vision, and in grey
_TITLE, _GENE = 40, 28  # letters of a line that is as wide as a map, and of a gene's name in it
_NARROW, _WIDE = 0.06, 0.15  # margins of maps, of the extent of the spots
_RING = "#1b1bb3"
_DPI = 130
SIMULATED = "simulated tissue"


def background(section: AnnData, longest_px: int = _BACKGROUND_PX) -> tuple[np.ndarray, tuple[float, float]] | None:
    """The slide at low resolution, uint8 [h, w, 3], and its full-resolution size (W, H) px; ``None`` without an
    image.

    Where the slide itself is gone, the picture that the section carries in ``uns["spatial"]``.
    """
    path = contract.slide_path(section)
    if path is not None and path.is_file():
        slide = open_slide(path)
        image, size = slide.thumbnail(longest_px), slide.size_px
        slide.close()
        return image, size
    return contract.picture(section)


def colours(n: int) -> list[str]:
    """``n`` colours of the maps from the lowest value to the highest, as #rrggbb."""
    return [to_hex(colour) for colour in colormaps[_COLOURS](np.linspace(0, 1, n))]


def genes_to_show(per_gene: pd.DataFrame, n: int = 1) -> dict[str, list[str]]:
    """The ``n`` best, median and worst genes by PCC; genes without one (constant) count as worst."""
    values = per_gene["pcc"].fillna(-2).to_numpy()
    order = [str(per_gene.index[i]) for i in np.argsort(-values, kind="stable")]
    middle = max(0, len(order) // 2 - n // 2)
    return {"best": order[:n], "median": order[middle : middle + n], "worst": order[-n:]}


def write_gene_map(predicted: AnnData, truth: AnnData, gene: str, path: Path, *, title: str = "") -> Path:
    """One gene, truth beside prediction, one colour scale in log2(1 + count), a scale bar in um; PNG or PDF by
    suffix."""
    return write_gene_maps(predicted, truth, [(gene, title)], path)


def write_gene_maps(predicted: AnnData, truth: AnnData, genes: Sequence[tuple[str, str]], path: Path) -> Path:
    """A row per (gene, title), measured beside predicted; PNG or PDF by suffix. Returns ``path``."""
    return write_method_maps(truth, {"predicted": predicted}, genes, path)


def write_method_maps(
    truth: AnnData, predictions: Mapping[str, AnnData], genes: Sequence[tuple[str, str]], path: Path
) -> Path:
    """A row per (gene, title): measured, then each method's prediction, on one colour scale; PNG or PDF by suffix."""
    behind = background(truth)
    n_columns = 1 + len(predictions)
    figure = Figure(figsize=(0.8 + 3.9 * n_columns, 0.4 + 3.35 * len(genes)), layout="constrained")
    axes = figure.subplots(len(genes), n_columns, squeeze=False)
    places = {name: truth.obs_names.get_indexer(p.obs_names).argsort() for name, p in predictions.items()}
    for (gene, title), row in zip(genes, axes, strict=True):
        values = {"measured": _truth_log2(truth, gene)}
        values |= {name: contract.expected_log2(p, [gene])[places[name], 0] for name, p in predictions.items()}
        top = max(1.0, *(float(v.max()) for v in values.values()))
        for axis, (name, value) in zip(row, values.items(), strict=True):
            _draw_tissue(axis, truth, behind)
            spots = _draw_spots(axis, truth, value, (0, top))
            axis.set_title(_title(gene, name), fontsize=10, parse_math=False)
        row[0].text(0, -0.02, title, transform=row[0].transAxes, fontsize=8, va="top", parse_math=False)
        figure.colorbar(spots, ax=row.tolist(), label="log2(1 + count)", shrink=0.8)  # pyright: ignore
    source = SIMULATED if contract.of_simulation(truth) else ""
    told = f"section {contract.name(truth)}" + (f" ({source})" if source else "")
    figure.suptitle(told, fontsize=10, parse_math=False)
    return _save(figure, path)


def _title(gene: str, name: str) -> str:
    """Within the width of a map."""
    gene = gene if len(gene) <= _GENE else f"{gene[: _GENE - 1]}…"
    return textwrap.fill(f"{gene} {name}", _TITLE, break_on_hyphens=False, max_lines=4, placeholder=" …")


def draw_map(axis, section: AnnData, values: np.ndarray, limits: tuple[float, float]):
    """Spots [N] coloured within ``limits`` on a matplotlib axis, with a scale bar and without the H&E; returns the
    spots, for a colour bar."""
    _draw_tissue(axis, section, None)
    return _draw_spots(axis, section, values, limits)


def write_section_maps(predicted: AnnData, truth: AnnData, per_gene: pd.DataFrame, folder: Path) -> None:
    """One map for the best, the median and the worst gene by ``per_gene["pcc"]``, and all of them on one page."""
    name, rows = contract.name(truth), []
    for rank, genes in genes_to_show(per_gene).items():
        written = []
        for gene in genes:
            value = per_gene.loc[gene, "pcc"]
            rows.append((gene, f"{rank} of {len(per_gene)} genes, PCC {value:.3f}"))
            path = folder / f"{name}_{rank}_{file_part(gene)}.png"
            written.append(write_gene_map(predicted, truth, gene, path, title=rows[-1][1]))
        for earlier in folder.glob(f"{glob.escape(name)}_{rank}_*.png"):
            if earlier not in written and _is_own(earlier):  # of another prediction's scores
                earlier.unlink()
    write_gene_maps(predicted, truth, rows, folder / f"{name}_overview.png")


def write_overlay(section: AnnData, path: Path, tissue: tuple[np.ndarray, np.ndarray, tuple] | None = None) -> Path:
    """Spots on tissue: shows at a glance whether coordinates and image belong together.

    Spots are rings, through which the tissue is seen, coloured by library size where there are counts. ``tissue`` is
    the view uint8 [h, w, 3], the tissue mask [h, w] found on it, and the slide's size (W, H) px: what is not tissue is
    then shown dark.
    """
    figure = Figure(figsize=(7.4, 7), layout="constrained")
    axis = figure.subplots()
    limits = _limits(section, tissue[2] if tissue is not None else None, _WIDE)
    behind = _closeup(section, tissue, limits) if tissue is not None else None
    _draw_tissue(axis, section, behind, limits)
    is_counted = section.n_vars > 0 and contract.LIBRARY_SIZE in section.obs  # a prediction is not
    total = section.obs[contract.LIBRARY_SIZE].to_numpy() if is_counted else np.zeros(section.n_obs)
    size = np.log10(1 + total.astype(float))
    spots = _draw_spots(axis, section, size, (float(size.min()), float(size.max()) + 1e-9))
    spots.set(facecolor="none", linewidth=1.2, alpha=1)
    if is_counted:
        figure.colorbar(spots, ax=axis, label="log10(1 + library size)", shrink=0.8)
    else:
        spots.set(array=None, edgecolor=_RING)
    dark = ", dark: not tissue" if tissue is not None else ", no image"
    axis.set_title(f"section {contract.name(section)}: {section.n_obs} spots{dark}", fontsize=10, parse_math=False)
    return _save(figure, path)


def _closeup(section: AnnData, tissue: tuple[np.ndarray, np.ndarray, tuple], limits: np.ndarray):
    """What of the slide lies within ``limits``, about 1000 px, and its (left, right, bottom, top) px; dark where there
    is no tissue. The whole view where the slide is not there or no part of it lies within."""
    view, mask, size = tissue
    low, high = np.floor(limits[:2].clip(0, size)).astype(int), np.ceil(limits[2:].clip(0, size)).astype(int)
    path = contract.slide_path(section)
    if path is None or not path.is_file() or (high <= low).any():
        low, high = np.zeros(2, int), np.array(size)
    else:
        view = closeup(path, tuple(low), tuple(high - low), _BACKGROUND_PX)
    places = [a + (np.arange(n) + 0.5) * (b - a) / n for a, b, n in zip(low, high, view.shape[1::-1], strict=True)]
    col, row = ((at / side * n).astype(int) for at, side, n in zip(places, size, mask.shape[::-1], strict=True))
    seen = np.where(mask[row[:, None], col][..., None], view, view * 0.55).astype(np.uint8)
    return seen, (low[0], high[0], high[1], low[1])


def write_training_curve(history: Sequence[dict], best_epoch: int, path: Path) -> Path:
    """Loss by epoch, and MSE and PCC of free-running generation on the validation spots."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    labels = {
        "train_loss": "training loss (nats per spot)",
        "val_mse": "validation MSE (log2)",
        "val_pcc": "validation PCC",
    }
    for axis, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        axis.plot(epochs, [entry[key] for entry in history], marker="o", markersize=3)
        axis.axvline(best_epoch, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xlabel="epoch", title=label)
        axis.title.set_fontsize(9)
    return _save(figure, path)


def _truth_log2(truth: AnnData, gene: str) -> np.ndarray:
    return np.log2(1 + contract.counts(truth, [gene])[:, 0])


def _limits(section: AnnData, size_px: tuple[float, float] | None, share: float = _NARROW) -> np.ndarray:
    """Left, top, right, bottom px of a map: the spots and a margin, ``share`` of their extent, but not beyond the image
    of ``size_px`` (W, H) as far as the spots do not lie there."""
    xy, radius = contract.coords_px(section), contract.spot_diameter_px(section)
    margin = share * np.ptp(xy, axis=0).max() + 100
    low, high = xy.min(axis=0), xy.max(axis=0)
    if size_px is None:
        return np.concatenate([low - margin, high + margin])
    return np.concatenate(
        [
            np.minimum(low - radius, np.maximum(low - margin, 0)),
            np.maximum(high + radius, np.minimum(high + margin, size_px)),
        ]
    )


def _draw_tissue(axis, section: AnnData, behind, limits: np.ndarray | None = None) -> None:
    """The image ``behind``, with its size (W, H) px or its (left, right, bottom, top) px, and a scale bar within it."""
    mpp, extent = contract.mpp(section), None
    if behind is not None:
        image, place = behind
        extent = place if len(place) == 4 else (0, place[0], place[1], 0)
        axis.imshow(image, extent=extent, alpha=0.75, interpolation="antialiased")
    if limits is None:
        limits = _limits(section, extent[1:3] if extent else None)
    left, top, right, bottom = limits
    axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar_um = 1000 if (right - left) * mpp > 3000 else 200
    step = 0.02 * max(right - left, bottom - top)
    x, y = left + step, bottom - step
    if extent is not None and extent[0] < right and top < extent[2]:
        x, y = max(left, extent[0]) + step, min(bottom, extent[2]) - step
    halo = [withStroke(linewidth=5, foreground="white")]
    axis.plot([x, x + bar_um / mpp], [y, y], color="black", linewidth=2.5, path_effects=halo, zorder=4)
    axis.text(x, y - step, f"{bar_um} µm", fontsize=7, path_effects=halo)


def _draw_spots(axis, section: AnnData, values: np.ndarray, limits: tuple[float, float]):
    diameter = np.full(section.n_obs, contract.spot_diameter_px(section))
    spots = EllipseCollection(
        diameter, diameter, np.zeros(section.n_obs), units="x", offsets=contract.coords_px(section),
        offset_transform=axis.transData, cmap=_COLOURS, alpha=0.95, linewidths=0,
    )  # fmt: skip
    spots.set_array(values)
    spots.set_clim(*limits)
    axis.add_collection(spots)
    return spots


def lay_out(figure: Figure, dpi: int) -> None:
    """For good, as it is to be saved: matplotlib would draw all of it a second time, to find the places."""
    engine = figure.get_layout_engine()
    assert engine is not None
    figure.set_dpi(dpi)
    engine.execute(figure)
    figure.set_layout_engine(None)


def refuse_foreign(path: Path) -> None:
    """``InputError`` where something lies at ``path`` that is no picture of GenAR's: it might be somebody's slide."""
    if path.exists() and not _is_own(path):
        raise InputError(f"{path}: is there already, and no picture of GenAR's; choose another --out, or delete it")


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(path) as found:
        return found.info.get("Software") == MARK
    return False


def _save(figure: Figure, path: Path) -> Path:
    """Write a PDF, or a PNG that says whose it is."""
    how: dict[str, Any] = {}
    if path.suffix == ".png":
        refuse_foreign(path)
        # a quicker compression than the default, of files a twentieth larger
        how = {"metadata": {"Software": MARK}, "pil_kwargs": {"compress_level": 3}}
    lay_out(figure, _DPI)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, **how)
    return path
