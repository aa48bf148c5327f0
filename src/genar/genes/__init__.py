"""The gene panel, its selection, the hierarchy of scales over it, and gene sets. Nothing here knows of
tensors or images."""

from genar.genes.panel import Panel, check_place, read_aliases, read_panel, refuse_number
from genar.genes.scales import ORDERS, Scales, cluster_order, default_sizes, fit_scales
from genar.genes.selection import DROPPED_PREFIXES, PAPER_N_TOP, RECIPES, leak_note, listed_panel, select_panel
from genar.genes.sets import gene_sets_of, group_names, order_by_sets, over_representation, read_gene_sets

__all__ = [
    "DROPPED_PREFIXES",
    "ORDERS",
    "PAPER_N_TOP",
    "RECIPES",
    "Panel",
    "Scales",
    "check_place",
    "cluster_order",
    "default_sizes",
    "fit_scales",
    "gene_sets_of",
    "group_names",
    "leak_note",
    "listed_panel",
    "order_by_sets",
    "over_representation",
    "read_aliases",
    "read_gene_sets",
    "read_panel",
    "refuse_number",
    "select_panel",
]
