"""The figures of a page, made of bokeh: maps of the spots over the H&E, calibration, training curve."""

# The checker does not know how bokeh's properties take values.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper, Range1d, Whisker
from bokeh.palettes import Cividis256, Greys256, Magma256, Viridis256, interp_palette
from bokeh.plotting import figure
from PIL import Image

from genar.data import contract
from genar.evaluation.calibration import zero_reliability
from genar.report import maps

# All readable without colour vision.
PALETTES = {
    "viridis": list(Viridis256),
    "cividis": list(Cividis256),
    "magma": list(Magma256),
    "grey": list(Greys256)[::-1],
}
DIVERGING = list(interp_palette(["#2166ac", "#f7f7f7", "#b2182b"], 255))
PANELS = ("measured", "predicted", "difference", "uncertainty")
_TISSUE_PX = 1400
_JPEG_QUALITY = 80
_TOOLTIPS = [("spot", "@barcode"), ("measured", "@measured"), ("predicted", "@predicted"), ("90 %", "@interval"),
             ("P(zero)", "@zero")]  # fmt: skip
_INK, _ACCENT = "#30343b", "#3b6ea5"
_UNIT = (
    "log2(1 + count)"  # bokeh leaves room for a title that is there from the start; the page puts others in its place
)


def spot_maps(section: AnnData, panels: Sequence[str]) -> dict[str, figure]:
    """A map a panel, over the H&E where there is one; one source of spots, one pair of ranges for all.

    The page fills the columns ``v_<panel>`` (what is coloured) and those of the tooltips.
    """
    xy = contract.coords_px(section)
    empty = np.zeros(len(xy), dtype=np.float32)
    words = ("barcode", "measured", "predicted", "interval", "zero")
    data = {"x": xy[:, 0], "y": xy[:, 1], "r": np.full(len(xy), contract.spot_diameter_px(section) / 2)}
    data |= {f"v_{panel}": empty for panel in PANELS} | {word: [""] * len(xy) for word in words}
    source = ColumnDataSource(data, name="spots")
    tissue = _tissue(section)
    margin = 0.05 * np.ptp(xy, axis=0).max() + contract.spot_diameter_px(section)
    low, high = xy.min(axis=0) - margin, xy.max(axis=0) + margin
    x_range = Range1d(float(low[0]), float(high[0]), name="x_range")
    y_range = Range1d(float(high[1]), float(low[1]), name="y_range")  # pixels are counted from the top
    made = {}
    for panel in panels:
        plot = figure(
            x_range=x_range, y_range=y_range, sizing_mode="stretch_width", height=430, name=f"map_{panel}",
            tools="pan,wheel_zoom,reset,save", active_scroll="wheel_zoom", toolbar_location="above", title=panel,
            output_backend="canvas",
        )  # fmt: skip
        if tissue is not None:
            plot.image_url("url", "x", "y", "w", "h", source=tissue, anchor="top_left", name=f"tissue_{panel}")
        mapper = LinearColorMapper(
            palette=DIVERGING if panel == "difference" else PALETTES["viridis"], low=0, high=1, nan_color="#bbbbbb",
            name=f"colours_{panel}",
        )  # fmt: skip
        edge = "#555555" if panel == "difference" else None  # about zero it is as pale as the tissue
        spots = plot.circle(
            "x", "y", radius="r", source=source, line_color=edge, line_width=0.5, fill_alpha=0.85,
            name=f"spots_{panel}", fill_color={"field": f"v_{panel}", "transform": mapper},
        )  # fmt: skip
        plot.add_tools(HoverTool(renderers=[spots], tooltips=_TOOLTIPS))
        bar = ColorBar(
            color_mapper=mapper, height=10, title=_UNIT, title_text_font_style="normal", title_text_color=_INK,
            name=f"bar_{panel}", padding=4,
        )  # fmt: skip
        plot.add_layout(bar, "below")
        plot.axis.visible = plot.grid.visible = False
        plot.toolbar.logo = None
        made[f"map_{panel}"] = plot
    return made


def _tissue(section: AnnData) -> ColumnDataSource | None:
    """The H&E, a JPEG within the page."""
    found = maps.background(section, _TISSUE_PX)
    if found is None:
        return None
    image, (width, height) = found
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=_JPEG_QUALITY)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return ColumnDataSource({"url": [url], "x": [0], "y": [0], "w": [width], "h": [height]}, name="tissue")


def coverage_figure(scores: Mapping[str, float]) -> figure | None:
    """Share of true counts within the 50 and 90 % intervals, by the mean count of the gene."""
    levels = [name.removeprefix("coverage_90_") for name in scores if name.startswith("coverage_90_")]
    levels = [level for level in levels if scores[f"coverage_90_{level}"] == scores[f"coverage_90_{level}"]]
    if not levels:
        return None
    names = ["all", *(level.replace("_", " ") for level in levels)]
    keys = ["", *(f"_{level}" for level in levels)]
    plot = _small("True counts inside the interval", x_range=names, name="coverage")
    for nominal, colour in ((90, _ACCENT), (50, "#d08c3f")):
        values = [scores.get(f"coverage_{nominal}{key}", np.nan) for key in keys]
        plot.scatter(names, values, size=11, color=colour, legend_label=f"{nominal} % interval")
        plot.hspan(y=nominal / 100, line_color=colour, line_dash="dashed", line_width=1)
    plot.y_range = Range1d(0, 1.02)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "genes, by mean true count", "share"
    plot.legend.location = "bottom_right"
    return plot


def zero_figure(p_zero: np.ndarray, truth: np.ndarray) -> figure:
    """How often a count is zero by the predicted probability of it; [N, G] each."""
    bins = zero_reliability(p_zero, truth)
    plot = _small("Is zero as probable as predicted?", name="zeros", x_range=(0, 1), y_range=(0, 1))
    plot.line([0, 1], [0, 1], color="#999999", line_dash="dashed")
    known = bins["n"] > 0
    n, x, y = (bins[name][known] for name in ("n", "predicted", "observed"))
    low, high = wilson(y, n)
    source = ColumnDataSource({"x": x, "y": y, "n": n, "low": low, "high": high})
    plot.line("x", "y", source=source, color=_ACCENT)
    plot.scatter("x", "y", source=source, size=8, color=_ACCENT)
    plot.add_layout(Whisker(source=source, base="x", lower="low", upper="high", line_color=_ACCENT))
    plot.add_tools(HoverTool(tooltips=[("predicted", "@x{0.000}"), ("observed", "@y{0.000}"), ("counts", "@n{0,0}")]))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "predicted probability of zero", "share of true zeros"
    return plot


def wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of a share of ``n`` (Wilson, 1927): it has a width at 0 and 1, too.

    >>> [end.round(3).tolist() for end in wilson(np.array([0.0, 0.5]), np.array([10, 10]))]
    [[0.0, 0.237], [0.278, 0.763]]
    """
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def training_figures(history: Sequence[Mapping], best_epoch: int) -> dict[str, figure]:
    """Loss by epoch and, on validation spots, MSE and PCC of free-running generation."""
    epochs, made = [entry["epoch"] for entry in history], {}
    for key, title in (
        ("train_loss", "Training loss, nats per spot"),
        ("val_mse", "Validation MSE, log2"),
        ("val_pcc", "Validation PCC"),
    ):
        values = [entry.get(key) for entry in history]
        if any(value is not None for value in values):
            plot = _small(title, name=key)
            plot.line(epochs, values, color=_ACCENT)
            plot.scatter(epochs, values, color=_ACCENT, size=6)
            plot.vspan(x=best_epoch, line_color="#999999", line_dash="dashed")
            plot.xaxis.axis_label = "epoch"
            made[key] = plot
    return made


def _small(title: str, **options) -> figure:
    plot = figure(
        title=title, height=300, sizing_mode="stretch_width", tools="save", toolbar_location="above", **options
    )
    plot.toolbar.logo = None
    plot.title.text_color = _INK
    return plot
