"""A prediction of simulated tissue without an encoder: by ridge, from what lies under each spot."""

import numpy as np

from genar.data import contract, read_sections
from genar.data.simulate import MARKERS, TissueConfig, write_tissue
from genar.genes import Panel
from genar.models import Decoding, Spots, model_class
from genar.models.checkpoint import Checkpoint
from genar.prediction import predict_section, write_prediction
from genar.training import TrainConfig, fit, make_spots

SHOWN = ("n_nuclei", "fraction_gland", "fraction_stroma", "fraction_immune", "fraction_fat")


def what_the_image_shows(section):
    """Features [N, 1, F]: what lies under each spot, in place of an encoder."""
    return section.obs[list(SHOWN)].to_numpy(np.float32)[:, None]


def write_toy(folder):
    """The sections of the demo and a prediction of the second one, where the demo leaves them, smaller."""
    config = TissueConfig(n_rows=14, n_cols=14, n_genes=110, mpp=2.0, counts_per_nucleus=20)
    training, held_out = read_sections(write_tissue(folder / "simulated_tissue", config=config))
    genes = Panel(tuple(sorted(gene for names in MARKERS.values() for gene in names.split())), "named")
    spots = Spots.join([make_spots(training, what_the_image_shows(training), genes.genes)])
    model = model_class("ridge").create(len(SHOWN), spots, "", {})
    fit(model, spots, TrainConfig())
    checkpoint = Checkpoint("ridge", model, genes, {})
    predicted = predict_section(checkpoint, held_out, what_the_image_shows(held_out), Decoding("mean"))
    return write_prediction(predicted, folder / "run" / "predictions" / f"{contract.name(held_out)}.h5ad")
