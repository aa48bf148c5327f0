"""Memory and time of training and prediction as the spots grow: 10^4 to 10^6, 1,280 features and 200 genes each.

    python benchmarks/scale.py train --out docs/img/scale.png [--spots 10000 100000 1000000] [--seconds 60]
    python benchmarks/scale.py predict [--spots 500000]
    python benchmarks/scale.py data --folder FOLDER [--spots 1000000]

A generator writes sections of simulated tissue straight to feature stores and to the file of counts, one section after
the other (3 GB for 10^6 spots, in a temporary folder). Every measurement runs in a process of its own; rates are by the
time that its one core was busy. ``train`` reads a whole epoch through the loader, spots held in memory beside spots
left on disk, and trains ``small`` at batch 256 on its batches for ``--seconds``; the model's time for an epoch is
extrapolated from those steps. ``predict`` writes the counts of one section by ``ridge`` and, of its first spots, by
``small``. With ``--lines FILE`` what was found is added to those lines of JSON, and the picture is of all of them.
``data`` leaves sections, stores and panel in ``FOLDER`` and says the command that trains a whole epoch on them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

N_FEATURES, N_GENES, SECTION, BATCH = 1280, 200, 5000, 256
N_LATENT = 12
GENES = [f"SIMG{i:04d}" for i in range(N_GENES)]


# -- simulated tissue -----------------------------------------------------------------------------------------------


def simulated(number, n_spots):
    """A section of ``n_spots`` (AnnData with counts) and its features float16 [n, 1, F], from smooth random fields: the
    same loadings in all sections, another layout in each."""
    import numpy as np
    from anndata import AnnData
    from scipy import sparse

    from genar.data import contract
    from genar.data.simulate import _field

    shared, random = np.random.default_rng(0), np.random.default_rng(1 + number)
    to_features = shared.standard_normal((N_LATENT, N_FEATURES), np.float32)
    to_genes = 0.4 * shared.standard_normal((N_LATENT, N_GENES), np.float32)
    level = shared.uniform(-1.5, 3, N_GENES).astype(np.float32)
    side = int(np.ceil(np.sqrt(n_spots)))
    fields = np.stack([_field(random, (side, side), 6).ravel()[:n_spots] for _ in range(N_LATENT)], axis=1)
    noise = random.standard_normal((n_spots, N_FEATURES), np.float32)
    features = (fields @ to_features + noise).astype(np.float16)[:, None]
    depth = 0.4 * random.standard_normal((n_spots, 1), np.float32)
    mean = np.exp(np.minimum(fields @ to_genes + level + depth, 6))
    counts = random.poisson(mean * random.gamma(10, 0.1, mean.shape)).clip(max=255)
    row, col = np.divmod(np.arange(n_spots), side)
    section = AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    section.obs_names, section.var_names = [f"{r}x{c}" for r, c in zip(row, col, strict=True)], GENES
    section.obsm["spatial"] = np.stack([col, row], axis=1) * 200.0 + 100
    contract.new_section(section, section=f"SIM{number}", mpp=0.5, spot_diameter_um=55, source="simulated")
    return section, features


def write_section(folder, number, n_spots):
    """``sections/SIM<number>.h5ad`` and its store, as `genar features --import` would leave it."""
    from genar.data import contract
    from genar.features.store import new_store

    section, features = simulated(number, n_spots)
    (folder / "sections").mkdir(exist_ok=True)
    section.write_h5ad(folder / "sections" / f"{contract.name(section)}.h5ad")
    path = store_of(folder, section)
    group = new_store(path, section, RECIPE(), N_FEATURES, dtype="float16", rows_per_chunk=16)  # as `genar features`
    for first in range(0, n_spots, 4096):
        group["features"][first : first + 4096] = features[first : first + 4096]
    return section


def RECIPE():  # noqa: N802
    from genar.features.imports import import_recipe

    return import_recipe("simulated")


def store_of(folder, section):
    from genar.features.recipe import store_path

    return store_path(section, RECIPE(), folder / "features")


def write_training(folder, n_spots):
    """All sections with their stores, the panel, and the counts of all in one file."""
    from genar.genes import Panel
    from genar.streaming import CountFile

    (folder / "features").mkdir(exist_ok=True)
    sizes = [min(SECTION, n_spots - first) for first in range(0, n_spots, SECTION)]
    sections = (write_section(folder, number, size) for number, size in enumerate(sizes))
    CountFile.write(folder / "counts.i32", sections, GENES)
    Panel(tuple(GENES), "given").write(folder / "panel.json")


# -- measuring ------------------------------------------------------------------------------------------------------


def rss_mib():
    """Resident memory now; pages of mapped files count."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


class Peak:
    """Highest resident memory while it runs, above what it was at the start."""

    def __enter__(self):
        self.start = self.most = rss_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.02):
            self.most = max(self.most, rss_mib())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.mib = max(self.most, rss_mib()) - self.start


def new_small(max_count):
    from genar.genes import Scales
    from genar.genes.scales import default_sizes
    from genar.models.genar import GenAR, small

    config = small(n_features=N_FEATURES, max_count=max_count)
    return GenAR(config, Scales(tuple(range(N_GENES)), default_sizes(N_GENES)))


def stored_spots(folder):
    import numpy as np

    from genar.data import contract, read_section
    from genar.features import Inputs, StoredInputs
    from genar.models import Spots
    from genar.streaming import CountFile, StoredSpots
    from genar.training import make_spots

    places, features = [], []
    for number in range(len(list((folder / "sections").glob("*.h5ad")))):  # the order of the file of counts
        section = contract.cut(read_section(folder / "sections" / f"SIM{number}.h5ad"), [])
        places.append(make_spots(section, np.zeros((section.n_obs, 1, 0), np.float32)))
        features.append(StoredInputs([store_of(folder, section)], section, Inputs()))
    return StoredSpots(Spots.join(places), features, CountFile(folder / "counts.i32", N_GENES))


def loader(folder, kind):
    """A whole epoch of batches: spots a second, and the memory of the data above that of the program and the model."""
    import torch

    from genar.batches import SpotLoader
    from genar.streaming import StreamedLoader

    torch.set_num_threads(1)
    model = new_small(255)  # it counts as there already
    assert model is not None
    with Peak() as peak:
        spots = stored_spots(folder)
        spots = spots if kind == "streamed" else spots.in_memory()
        n_batches = -(-len(spots) // BATCH)
        batches = (
            StreamedLoader(spots, n_batches, 1, lambda: 0)
            if kind == "streamed"
            else SpotLoader(spots, n_batches, 1, 0, lambda: 0, 0, 1)
        )
        started, busy, seen = time.perf_counter(), time.process_time(), 0
        for share in batches:
            seen += len(share.batch.features)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    assert seen == len(spots)
    return {"seconds": seconds, "cpu_seconds": busy, "spots_per_cpu_second": seen / busy, "data_mib": peak.mib}


def steps(folder, seconds):
    """Preparation, then real training steps of ``small`` on the loader's batches for so many seconds."""
    import torch

    from genar import machine
    from genar.streaming import StreamedLoader, look_at

    machine.keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = new_small(255)
    spots = stored_spots(folder)
    started = time.process_time()
    with Peak() as prepared:
        model.prepare(look_at(model, spots))
    prepare_seconds = time.process_time() - started
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(StreamedLoader(spots, -(-len(spots) // BATCH), 1, lambda: 0))
    share = next(batches)  # the first window is read while nothing can be trained on
    n_spots, losses, started = 0, [], time.process_time()
    while share is not None and time.process_time() - started < seconds:
        optimizer.zero_grad()
        loss = model.loss(share.batch).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        n_spots += len(share.batch.features)
        share = next(batches, None)
    total = time.process_time() - started
    return {
        "prepare_cpu_seconds": prepare_seconds, "prepare_mib": prepared.mib, "steps": len(losses),
        "spots_per_cpu_second": n_spots / total, "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


def prediction(folder, name, n_spots, n_first):
    """Counts of a section's first ``n_first`` spots, written in blocks: seconds, memory, size of the file."""
    import torch

    from genar.data import read_section
    from genar.features import Inputs, StoredInputs
    from genar.genes import Panel
    from genar.models.checkpoint import Checkpoint
    from genar.models.ridge import Ridge
    from genar.prediction import decoding, predict_to_file

    torch.set_num_threads(1)
    section = read_section(folder / "SIM0.h5ad")
    store = StoredInputs([store_of(folder, section)], section, Inputs())

    class First:
        shape = (n_first, 1, N_FEATURES)

        def __getitem__(self, rows):
            return store[rows.start : min(rows.stop, n_first)]

    torch.manual_seed(0)
    model = Ridge(N_FEATURES, N_GENES) if name == "ridge" else new_small(255)
    if name == "ridge":
        model.weight.normal_(std=0.02)
        model.feature_scale.fill_(1)
        model.intercept.fill_(2)
    model.eval()
    checkpoint = Checkpoint(name, model, Panel(tuple(GENES), "given"), {})
    path = folder / "pred.h5ad"
    started, busy = time.perf_counter(), time.process_time()
    predict_to_file(checkpoint, section[:n_first].copy(), First(), path, decoding(model, {}))
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    peak = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["VmHWM"]
    return {
        "seconds": seconds, "spots_per_cpu_second": n_first / busy, "peak_rss_mib": int(peak.split()[0]) / 1024,
        "file_mib": path.stat().st_size / 2**20,
    }  # fmt: skip


def write_one(folder, n_spots):
    """One section of ``n_spots``, its features written in pieces."""
    import numpy as np
    from anndata import AnnData

    from genar.data import contract
    from genar.features.store import new_store

    side = int(np.ceil(np.sqrt(n_spots)))
    row, col = np.divmod(np.arange(n_spots), side)
    section = AnnData(np.zeros((n_spots, 0), np.float32))
    section.obs_names = [f"{r}x{c}" for r, c in zip(row, col, strict=True)]
    section.obsm["spatial"] = np.stack([col, row], axis=1) * 200.0 + 100
    contract.new_section(section, section="SIM0", mpp=0.5, spot_diameter_um=55, source="simulated")
    section.write_h5ad(folder / "SIM0.h5ad")
    (folder / "features").mkdir()
    group = new_store(store_of(folder, section), section, RECIPE(), N_FEATURES, dtype="float16", rows_per_chunk=16)
    for first in range(0, n_spots, SECTION):
        size = min(SECTION, n_spots - first)
        group["features"][first : first + size] = simulated(first, size)[1]


# -- the runs -------------------------------------------------------------------------------------------------------

JOBS = {
    "write_training": write_training, "write_one": write_one, "loader": loader, "steps": steps, "prediction": prediction
}  # fmt: skip


def job(name, folder, *arguments):
    """What a job gives, run in a process of its own."""
    words = [sys.executable, __file__, "--job", json.dumps([name, str(folder), *arguments])]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train(options):
    found = []
    for n_spots in options.spots:
        with tempfile.TemporaryDirectory(prefix="genar-scale-", dir=options.folder) as scratch:
            folder = Path(scratch)
            started = time.perf_counter()
            job("write_training", folder, n_spots)
            on_disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**30
            one = {"spots": n_spots, "write_seconds": time.perf_counter() - started, "disk_gib": on_disk}
            one["streamed"] = job("loader", folder, "streamed")
            one["held"] = job("loader", folder, "held") if n_spots <= options.most_held else None
            one["steps"] = job("steps", folder, options.seconds)
            found.append(one)
            print(json.dumps(one), flush=True)
            if options.lines:
                with options.lines.open("a") as file:
                    file.write(json.dumps(one) + "\n")
    if options.lines:
        found = [json.loads(line) for line in options.lines.read_text().splitlines()]
    if options.out:
        draw(sorted(found, key=lambda one: one["spots"]), options.out)


def draw(found, path):
    """Memory, the loader's time and the model's over the number of spots, axes linear."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    millions = [one["spots"] / 1e6 for one in found]
    held = [(one["spots"] / 1e6, one["held"]) for one in found if one["held"]]
    figure, (memory, reading, training) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    memory.plot(millions, [one["streamed"]["data_mib"] / 1024 for one in found], "o-", label="streamed from stores")
    memory.plot([m for m, _ in held], [h["data_mib"] / 1024 for _, h in held], "s-", label="held in memory")
    memory.axhline(2, color="grey", linestyle=":", label="bound: 2 GiB")
    memory.set_ylabel("resident memory of the data, GiB")
    memory.legend(fontsize=8)
    reading.plot(millions, [one["streamed"]["cpu_seconds"] for one in found], "o-", label="streamed from stores")
    reading.plot([m for m, _ in held], [h["cpu_seconds"] for _, h in held], "s-", label="held in memory")
    reading.set_ylabel("seconds of a core to load an epoch")
    reading.legend(fontsize=8)
    hours = [one["spots"] / one["steps"]["spots_per_cpu_second"] / 3600 for one in found]
    training.plot(millions, hours, "o--", color="C2", label="small, extrapolated from its steps")
    training.plot(millions, [one["streamed"]["cpu_seconds"] / 3600 for one in found], "o-", label="loader, measured")
    training.set_ylabel("hours of an epoch on one core")
    training.legend(fontsize=8)
    for axis in (memory, reading, training):
        axis.set_xlabel("million spots")
        axis.set_xlim(0)
        axis.set_ylim(0)
    figure.savefig(path, dpi=80)


def data(options):
    """Sections, stores and panel for an epoch by `genar train`; one section more, of 400 spots, is held out."""
    from genar.data import contract

    folder, (n_spots,) = Path(options.folder), options.spots
    folder.mkdir(parents=True)
    write_training(folder, n_spots)
    held_out = contract.name(write_section(folder, -(-n_spots // SECTION), 400))
    print(
        f"genar train {folder}/sections --test {held_out} --panel {folder}/panel.json --encoder {RECIPE().encoder} "
        f"--features {folder}/features --set batch_size={BATCH} --set max_epochs=1 --out {folder}/run"
    )


def predict(options):
    for n_spots in options.spots:
        with tempfile.TemporaryDirectory(prefix="genar-scale-", dir=options.folder) as scratch:
            folder = Path(scratch)
            job("write_one", folder, n_spots)
            found = {"spots": n_spots, "ridge": job("prediction", folder, "ridge", n_spots, n_spots)}
            found["small, first spots"] = job("prediction", folder, "small", n_spots, min(n_spots, options.first))
            print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "predict", "data"), nargs="?", default="train")
    parser.add_argument("--spots", type=int, nargs="*")
    parser.add_argument("--seconds", type=float, default=60, help="of real training steps")
    parser.add_argument("--most-held", type=int, default=200_000, help="spots held in memory for comparison, at most")
    parser.add_argument("--first", type=int, default=512, help="spots that `small` predicts")
    parser.add_argument("--folder", help="where the temporary data lie; of `data`, what is written")
    parser.add_argument("--out", type=Path, help="PNG of the curves")
    parser.add_argument("--lines", type=Path, help="file of earlier measurements, which these join")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, folder, *arguments = json.loads(options.job)
        print(json.dumps(JOBS[name](Path(folder), *arguments)))
        return
    options.spots = (
        options.spots
        if options.spots is not None
        else {"train": [10**4, 10**5, 10**6], "predict": [500_000], "data": [10**6]}[options.what]
    )
    {"train": train, "predict": predict, "data": data}[options.what](options)


if __name__ == "__main__":
    main()
