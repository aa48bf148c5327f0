"""Whether predictions are the same bytes: in batches of any size, in any order of the spots, after saving and loading,
and with another number of threads. Prints the largest difference of any layer, and how many counts differ.

    python benchmarks/sameness.py            every model
    python benchmarks/sameness.py genar      one

A model of small settings is trained for an epoch on one simulated section and predicts another.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from genar.data import read_sections
from genar.data.simulate import TissueConfig, write_tissue
from genar.genes import Panel
from genar.models import Decoding, model_class, model_names
from genar.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from genar.prediction import predict_section
from genar.training import TrainConfig, fit, make_spots

BATCHES = (1, 7, 64, 1000)
N_FEATURES = 64
N_GENES = 60
GENAR = {"width": 64, "depth": 2, "heads": 2, "max_count": 63, "linear_start": False}


def differ(one, other):
    """(largest difference over the layers, counts that differ) of two predictions."""
    layers = max(float(np.abs(one.layers[name] - other.layers[name]).max()) for name in one.layers)
    return layers, int((one.X != other.X).nnz)


def compare(name, learned, asked, folder):
    """What differs, for one model."""
    genes = tuple(learned.var_names[:N_GENES])
    random = np.random.default_rng(0)
    features = [random.normal(size=(s.n_obs, 1, N_FEATURES)).astype(np.float32) for s in (learned, asked)]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spots = make_spots(learned, features[0], genes)
    model = model_class(name).create(N_FEATURES, spots, "small", GENAR if name == "genar" else {})
    fit(model, spots, TrainConfig(max_epochs=1))
    fitted = Checkpoint(name, model, Panel(genes, "given"), {"encoder": "none"})
    how = Decoding(decode=model.decodings[0], samples=4)

    def predict(checkpoint=fitted, rows=slice(None), n_threads=1, **options):
        torch.set_num_threads(n_threads)
        return predict_section(checkpoint, asked[rows].copy(), features[1][rows], how, **options)

    whole = predict()
    order = random.permutation(asked.n_obs)
    saved = load_checkpoint(save_checkpoint(folder / name, fitted))
    found = {f"batches of {size}": differ(whole, predict(batch_size=size)) for size in BATCHES}
    found["other order"] = differ(whole[order].copy(), predict(rows=order, batch_size=7))
    found["saved and loaded"] = differ(whole, predict(saved))
    found["2 threads"] = differ(whole, predict(n_threads=2))
    found["2 threads, batches of 7"] = differ(predict(n_threads=2), predict(n_threads=2, batch_size=7))
    return found


def main(names):
    with tempfile.TemporaryDirectory() as folder:
        tissue = write_tissue(Path(folder) / "tissue", config=TissueConfig(n_rows=9, n_cols=9, n_genes=120))
        learned, asked = read_sections(tissue)
        for name in names or model_names():
            found = compare(name, learned, asked, Path(folder))
            print(f"{name} ({model_class(name).unit})", flush=True)
            for case, (largest, n_counts) in found.items():
                print(f"    {case:<26} {largest:.1e}, {n_counts} counts")


if __name__ == "__main__":
    main(sys.argv[1:])
