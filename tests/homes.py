"""Folders as users have them: a simulated tissue, runs on it, and the features that they read."""

import anndata

from genar.data import contract, read_section
from genar.data.simulate import TissueConfig, write_tissue


def write_sections(folder, names, side, n_genes, *, seed=0, mpp=0.7):
    """Simulated sections of ``side`` x ``side`` places."""
    config = TissueConfig(n_rows=side, n_cols=side, n_genes=n_genes, mpp=mpp, counts_per_nucleus=20)
    return write_tissue(folder, tuple(names), seed=seed, config=config)


def quiet(line):
    pass


def write_home(folder):
    """Sections S1 and S2 in ``tissue``, a GenAR that held S2 out in ``run``; its features, by a narrow encoder,
    in ``store``."""
    from genar.runs import train_run
    from genar.settings import read_settings
    from genar.train_plan import TrainPlan

    write_sections(folder / "tissue", ("S1", "S2"), 6, 110, mpp=2.0)
    net = ("width=16", "depth=1", "heads=2", "components=4", "max_epochs=1", "samples=2", "widths_um=[112]")
    plan = TrainPlan(
        folder / "tissue", ("S2",), folder / "run", n_genes=20, views=1, encoder="genar.bench.toy:narrow_encoder",
        features=folder / "store", settings=read_settings(None, net, "genar"), maps=False,
    )  # fmt: skip
    train_run(plan, say=quiet)
    return folder


def write_lite0_home(folder):
    """Sections A and B in ``tissue``, a GenAR in ``run`` and a ridge in ``ridge`` that held B out, trained from Python
    on the features of the package's own encoder, which lie in ``store``."""
    import genar

    write_sections(folder / "tissue", "AB", 6, 110, mpp=2.0)
    more = {"test": "B", "n_genes": 20, "views": 1, "features": folder / "store", "progress": False}
    settings = {"width": 16, "depth": 1, "heads": 2, "max_count": 31, "components": 4, "max_epochs": 1,
                "widths_um": [], "context_spots": [2]}  # fmt: skip
    genar.train(folder / "tissue", folder / "run", settings=settings, samples=2, seed=3, accumulate=2, **more)
    genar.train(folder / "tissue", folder / "ridge", model="ridge", **more)
    return folder


def write_ridge_home(folder):
    """Two small sections A and B in ``tissue``, and in ``run`` a ridge that held B out."""
    from genar.runs import train_run
    from genar.train_plan import TrainPlan

    write_sections(folder / "tissue", "AB", 5, 80, mpp=2.0)
    plan = TrainPlan(
        folder / "tissue", ("B",), folder / "run", "ridge", n_genes=8, views=1, features=folder / "store", maps=False
    )
    train_run(plan, say=quiet)
    return folder


def write_fine_home(folder):
    """Sections A and B, at 0.7 um a pixel, in ``tissue``, and in ``run`` a ridge that held B out."""
    from genar.runs import train_run
    from genar.train_plan import TrainPlan

    write_sections(folder / "tissue", "AB", 6, 80)
    train_run(TrainPlan(folder / "tissue", ("B",), folder / "run", "ridge", n_genes=20, views=1), say=quiet)
    return folder


def write_report_run(tissue, out):
    """A run with the distributions that a page shows, on the sections SIM1 and SIM2 of ``tissue``; SIM2 is held out."""
    from genar.runs import train_run
    from genar.settings import Settings
    from genar.train_plan import TrainPlan

    model = {"width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63}
    epochs = {"max_epochs": 2, "validate_every": 1, "batch_size": 16, "validation_share": 0.2}
    settings = Settings(model=model, train=epochs, decoding={"samples": 2})
    train_run(TrainPlan(tissue, ("SIM2",), out, n_genes=20, views=1, settings=settings), say=quiet)
    return out


def predict_simulated(sections):
    """The second section, predicted by ridge from random features of both."""
    import numpy as np

    from genar.genes import Panel
    from genar.models import Spots, model_class
    from genar.models.checkpoint import Checkpoint
    from genar.prediction import predict_section
    from genar.training import TrainConfig, fit, make_spots

    panel = Panel(tuple(sections[0].var_names[:10]), "given")
    features = [np.random.default_rng(i).normal(size=(s.n_obs, 1, 6)).astype("f4") for i, s in enumerate(sections)]
    spots = Spots.join([make_spots(s, f, panel.genes) for s, f in zip(sections, features, strict=True)])
    model = model_class("ridge").create(6, spots, "", {})
    fit(model, spots, TrainConfig())
    return predict_section(Checkpoint("ridge", model, panel, {"encoder": "none"}), sections[1], features[1])


def pair_of_one_gene(ridge_home, gene, section="B"):
    """A prediction of one gene, and the truth, in which that gene has another name."""
    predicted = anndata.read_h5ad(ridge_home / "run/predictions/B.h5ad")[:, :1].copy()
    truth = read_section(f"{ridge_home / 'tissue'}:B")
    truth.var_names = [gene if name == predicted.var_names[0] else name for name in truth.var_names]
    predicted.var_names = [gene]
    truth.uns[contract.GENAR][contract.SECTION] = section
    return predicted, truth
