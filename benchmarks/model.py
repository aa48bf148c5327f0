"""Speed and memory of GenAR against a plain implementation of the released design, measured in one run.

    python benchmarks/model.py [--sizes small,released] [--batches 16,64] [--threads 2] [--bf16 auto] [--curves PNG]

Every measurement runs in a process of its own: the median of its repetitions, and by how much its peak of resident
memory rose above the built model.
The ratios are to the plain implementation of the released design at the same size, batch and threads (float32).
``queries`` is the preset with attention through the interpolated positions and the classes that the data needs;
``recompute`` and ``compiled`` are that, with activations computed again (and ``memory_gib`` 0.75) and with compiled
blocks; a batch goes through in parts where the package would; ``tokens`` keeps the
paper's history and all classes. "share" is of the speed of a large matrix product, measured just before at the same
precision and threads.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Width, layers, heads.
SIZES = {"small": (128, 4, 4), "released": (512, 8, 8)}
# The released design has 2001 count classes; ours cuts them to what the data needs: 512 on HER2ST.
RELEASED_COUNT, NEEDED_COUNT = 2000, 511
RECOMPUTE_GIB = 0.75  # ``memory_gib`` of the variant that saves memory
SCALES = (1, 4, 8, 40, 100, 200)
SECONDS = 3  # a measurement lasts so long at least
VARIANTS = ("plain", "tokens", "queries", "recompute", "compiled")


def build(variant, size, scales):
    """(loss of a batch, generation of a batch) as functions of the batch size."""
    import torch

    from genar.genes import Scales
    from genar.models import Batch, Decoding, Spots
    from genar.models.genar import PRESETS, GenAR

    width, depth, heads = SIZES[size]
    torch.manual_seed(0)
    sizes, n_features = tuple(scales), 1280
    counts = torch.poisson(torch.rand(64, sizes[-1]) * 20).long()
    features, xy = torch.randn(64, n_features), torch.rand(64, 2) * 5000
    if variant == "plain":
        sys.path.insert(0, str(HERE))
        from plain import Plain

        model = Plain(n_features, width, depth, heads, RELEASED_COUNT, sizes)
        code = torch.randn(64, 256)
        return (
            model,
            lambda n: model.loss(features[:n], code[:n], counts[:n]),
            lambda n: model.generate(features[:n], code[:n]),
        )
    options = {"max_count": NEEDED_COUNT, "history": "queries", "within": "full", "recompute": variant == "recompute"}
    if variant == "tokens":
        options = {"max_count": RELEASED_COUNT, "history": "tokens", "within": "causal"}
    model = GenAR(
        PRESETS[size](n_features=n_features, width=width, depth=depth, heads=heads, drop_path=0.0, **options),
        Scales(tuple(range(sizes[-1])), sizes),
    )
    spots = Spots(
        features[:, None], xy, xy / 5000, torch.arange(64), torch.zeros(64, dtype=torch.long), counts.clamp(max=511)
    )
    model.prepare(spots)

    def batch(n):
        return Batch(features[:n], xy[:n], xy[:n] / 5000, torch.arange(n), counts[:n])

    if variant == "compiled":
        for block in model.blocks:
            block.compile(dynamic=False)
    return (
        model,
        lambda n: model.loss(batch(n)).total,
        lambda n: model.generate(batch(n), Decoding("greedy", layers=())),
    )


def measure(job):
    """Run one job in this process and print its figures as JSON."""
    import contextlib

    import torch

    from genar.machine import keep_freed_memory
    from genar.training_config import TrainConfig
    from genar.training_loop import count_parts

    keep_freed_memory()
    torch.set_num_threads(job["threads"])
    bf16 = job["precision"] == "bf16"
    model, loss, generate = build(job["variant"], job["size"], job["scales"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    sizes = [job["batch"]]
    if job["what"] == "train" and job["variant"] != "plain":  # in parts, as the package trains
        memory_gib = RECOMPUTE_GIB if job["variant"] == "recompute" else TrainConfig().memory_gib
        parts = count_parts(model, job["batch"], memory_gib)
        sizes = [len(part) for part in torch.arange(job["batch"]).tensor_split(parts)]

    def step():
        optimizer.zero_grad()
        for size in sizes:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                value = loss(size) if job["what"] == "train" else generate(size)
            if job["what"] == "train":
                value.backward()
        if job["what"] == "train":
            optimizer.step()

    model.train(job["what"] == "train")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    step()
    first, seconds = time.perf_counter() - started, []
    while len(seconds) < job["repeats"] or sum(seconds) < SECONDS:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from torch.utils.flop_counter import FlopCounterMode

    flops = None
    if job["variant"] in ("plain", "tokens", "queries"):
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
    median = statistics.median(seconds)
    print(json.dumps({"seconds": median, "first": first, "gib": (peak - base) / 2**20, "flops": flops}))


def peak_flops(threads, precision):
    """Speed of a large matrix product, FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds[1:])


def run(**job):
    """A job in a process of its own; ``None`` where it ran out of memory."""
    job = {"repeats": 3, "scales": SCALES, **job}
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        print(f"  failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'killed (memory)'}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(size, batches, threads, precisions, variants):
    print(f"\n## {size}: width {SIZES[size][0]}, {SIZES[size][1]} layers, {threads} threads")
    print("| job | batch | precision | variant | spots/s | share | GiB | x plain | first step s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for what in ("generate", "train"):
        for batch in batches:
            plain = None
            for variant in variants:
                if what == "generate" and variant == "recompute":
                    continue
                for precision in precisions if variant != "plain" else ("fp32",):
                    if (variant, what, size, batch) == ("plain", "train", "released", 64):
                        continue  # needs more than 24 GiB
                    peak = peak_flops(threads, precision)
                    job = {"size": size, "batch": batch, "threads": threads, "precision": precision, "what": what}
                    found = run(variant=variant, **job)
                    if found is None:
                        continue
                    speed = batch / found["seconds"]
                    plain = speed if variant == "plain" else plain
                    share = f"{found['flops'] / found['seconds'] / peak:.0%}" if found["flops"] else ""
                    ratio = f"{speed / plain:.2f}" if plain else ""
                    print(
                        f"| {what} | {batch} | {precision} | {variant} | {speed:.1f} | {share} | {found['gib']:.2f} | "
                        f"{ratio} | {found['first']:.1f} |",
                        flush=True,
                    )


def curves(path, threads):
    """Seconds over spots and over genes, for training and generation of ``small``: PNG."""
    from matplotlib.figure import Figure

    from genar.genes import default_sizes

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    job = {"size": "small", "threads": threads, "precision": "fp32", "variant": "queries", "repeats": 2}
    for what, colour in (("generate", "tab:blue"), ("train", "tab:orange")):
        spots = [4, 8, 16, 32, 64]
        seconds = [run(what=what, batch=n, **job)["seconds"] for n in spots]
        axes[0].plot(spots, seconds, "o-", color=colour, label=what)
        genes = [100, 200, 500, 1000, 2000]
        seconds = [run(what=what, batch=8, scales=default_sizes(n), **job)["seconds"] for n in genes]
        axes[1].plot(genes, seconds, "o-", color=colour, label=what)
        growth = [round(float(b / a), 2) for a, b in itertools.pairwise(seconds)]
        print(f"{what}: seconds for 8 spots at {genes} genes: {[round(s, 3) for s in seconds]}, steps x{growth}")
    for axis, label in zip(axes, ("spots in a batch (200 genes)", "genes (8 spots)"), strict=True):
        axis.set(xlabel=label, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    print(f"curves: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,released")
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--bf16", choices=("auto", "yes", "no"), default="auto", help="auto: where the CPU gains by it")
    parser.add_argument("--curves", help="PNG of the cost over spots and genes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return measure(json.loads(options.job))
    from genar.machine import bf16_gain

    gain = bf16_gain()
    bf16 = options.bf16 == "yes" or (options.bf16 == "auto" and gain > 1)
    precisions = ("fp32", "bf16") if bf16 else ("fp32",)
    print(f"products of bf16 matrices run at {gain:.2f} times the speed of fp32 on this CPU")
    if not bf16:
        print("bf16 is left out (--bf16 yes measures it nevertheless)")
    for threads in map(int, options.threads.split(",")):
        for size in options.sizes.split(",") if options.sizes else ():
            compare(
                size, [int(n) for n in options.batches.split(",")], threads, precisions, options.variants.split(",")
            )
    if options.curves:
        curves(options.curves, int(options.threads.split(",")[-1]))


if __name__ == "__main__":
    main()
