"""Draw docs/img/scales.png: python docs/img/draw_scales.py"""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from genar.genes import Scales, default_sizes

scales = Scales(tuple(range(200)), default_sizes(200))
figure = Figure(figsize=(9, 3.2), layout="constrained")
axis = figure.subplots()
colours = colormaps["viridis"]
for k, size in enumerate(scales.sizes):
    edges = scales.edges(k)
    for t in range(size):
        colour = colours(0.1 + 0.8 * (edges[t] + edges[t + 1]) / 400)
        left, width = edges[t], edges[t + 1] - edges[t]
        axis.add_patch(Rectangle((left + 0.1, -k - 0.4), width - 0.2, 0.8, color=colour))
    genes = 200 // size
    axis.text(-2, -k, f"scale {k + 1}: {size}", ha="right", va="center", fontsize=9)
    axis.text(202, -k, f"{genes} gene{'s' if genes > 1 else ''} a group", ha="left", va="center", fontsize=9)
axis.set(xlim=(-32, 240), ylim=(-5.6, 0.6))
axis.axis("off")
figure.savefig(Path(__file__).with_name("scales.png"), dpi=130)
