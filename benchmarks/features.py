"""Speed and memory of embedding, beside a plain loop that holds the whole image and reads and encodes in turn.

    python benchmarks/features.py                      speed: patches per second, peak memory
    python benchmarks/features.py --memory             one slide of 100,000 x 100,000 px with 100,000 spots
    python benchmarks/features.py --encoder resnet50   another encoder, with random weights

Every measurement is a process of its own. The encoder computes with the cores that the reading processes leave, in all
measurements the same number.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH_PX = 320  # 112 um at 0.35 um per px
MARGIN_PX = 400


def write_slide(path, side, *, sparse):
    """A pyramid of tissue-like tiles; ``sparse``: most tiles are left out, as on a scan with much glass."""
    import tifffile

    kinds = [tissue(512, seed) for seed in range(8)]
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in range(4):
            size = side >> level
            n = (-(-size // 512)) ** 2
            tiles = (None if sparse and i % 50 else kinds[i % 8] for i in range(n))
            tiff.write(
                tiles, shape=(size, size, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb",
                subfiletype=int(level > 0), compression="zlib" if sparse else "jpeg",
            )  # fmt: skip


def tissue(size, seed):
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=(size, size, 3))
    smooth = sum(gaussian_filter(noise, (s, s, 0)) * s for s in (1, 3, 9))
    return np.clip(np.array([200, 150, 190]) + 40 * smooth, 0, 255).astype(np.uint8)


def section_of(path, side, n_spots):
    from anndata import AnnData
    from scipy import sparse

    from genar.data import contract

    adata = AnnData(sparse.csr_matrix((n_spots, 1), dtype=np.float32))
    adata.obs_names = [f"s{i}" for i in range(n_spots)]
    per_row = int(np.ceil(n_spots**0.5))
    row, column = np.divmod(np.arange(n_spots), per_row)
    pitch = (side - 2 * MARGIN_PX) / per_row
    adata.obsm["spatial"] = MARGIN_PX + pitch * np.stack([column, row], axis=1).astype(float)
    return contract.new_section(adata, section="S", slide=path, mpp=112 / WIDTH_PX, spot_diameter_um=55, source="bench")


def encoder_of(name, threads):
    import torch

    from genar.encoders import ENCODERS, Encoder, EncoderRow, build_network

    torch.set_num_threads(threads)
    if name == "tiny":
        row = EncoderRow("tiny", "", "", 64, 224, (0.5,) * 3, (0.5,) * 3, "MIT", views=1, library="")
        layers = torch.nn.Conv2d(3, 64, 16, stride=16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        return Encoder(row, torch.nn.Sequential(*layers))
    return Encoder(ENCODERS[name], build_network(ENCODERS[name]))


def measure(what, slide, side, args):
    """Patches per second of one kind of work, and what memory it took beyond the encoder's own."""
    from genar.data import contract, open_slide
    from genar.data.patches import Readers
    from genar.features import embed, recipe_of

    section = section_of(slide, side, args.spots)
    encoder = encoder_of(args.encoder, max(1, (os.cpu_count() or 1) - args.workers))
    px = encoder.row.input_px
    encoder(np.zeros((16, px, px, 3), np.uint8))
    centers, before = contract.coords_px(section), peak_mib()
    n, reading_mib = len(centers), 0.0
    if what == "reading":
        with contextlib.closing(open_slide(slide)) as opened, Readers(args.workers) as readers:
            list(readers.patches(opened, centers[:32], WIDTH_PX, px))  # workers are up
            start = time.perf_counter()
            n = sum(len(patches) for _, patches in readers.patches(opened, centers, WIDTH_PX, px))
            seconds, reading_mib = time.perf_counter() - start, worker_mib(readers)
    elif what == "encoding":
        patches = np.random.default_rng(0).integers(0, 255, (16, px, px, 3), np.uint8)
        start, n = time.perf_counter(), 0
        while n < len(centers):
            encoder(patches)
            n += 16
        seconds = time.perf_counter() - start
    elif what == "both":
        with tempfile.TemporaryDirectory() as store, Readers(args.workers) as readers:
            with contextlib.closing(open_slide(slide)) as opened:
                list(readers.patches(opened, centers[:32], WIDTH_PX, px))
            start = time.perf_counter()
            embed(section, encoder, recipe_of(encoder, views=1), Path(store), readers=readers)
            seconds, reading_mib = time.perf_counter() - start, worker_mib(readers)
    else:
        start = time.perf_counter()
        plain(slide, centers, encoder)
        seconds = time.perf_counter() - start
    return {"rate": n / seconds, "mib": peak_mib() - before, "worker_mib": reading_mib}


def plain(slide, centers, encoder):
    """The whole image in memory; crop, resize and encode, one batch after the other."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    image, out, px = Image.open(slide).convert("RGB"), [], encoder.row.input_px
    for first in range(0, len(centers), 16):
        boxes = [
            (*(c - WIDTH_PX // 2).astype(int), *(c + WIDTH_PX // 2).astype(int)) for c in centers[first : first + 16]
        ]
        crops = [image.crop(box).resize((px, px), Image.Resampling.BILINEAR) for box in boxes]
        out.append(encoder(np.stack([np.asarray(crop) for crop in crops])).numpy())
    return np.concatenate(out)


def peak_mib(status=None):
    """Peak memory of this process; that of another where its ``/proc/PID/status`` is given. (``getrusage`` would count
    what the parent held when it started this one.)"""
    status = status or Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def worker_mib(readers):
    pool = readers._processes
    return peak_mib(pool.submit(eval, "open('/proc/self/status').read()").result()) if pool else 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--side", type=int)
    parser.add_argument("--spots", type=int)
    parser.add_argument("--encoder")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--slide", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.side = args.side or (100_000 if args.memory else 12_000)
    args.spots = args.spots or (100_000 if args.memory else 800)
    args.encoder = args.encoder or ("tiny" if args.memory else "efficientnet_lite0")
    if args.measure:
        print(json.dumps(measure(args.measure, args.slide, args.side, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "slide.tif"
        write_slide(slide, args.side, sparse=args.memory)
        print(f"{args.side} x {args.side} px, {args.spots} spots, {args.encoder}, {args.workers} reading processes")
        results = {}
        for what in ("both",) if args.memory else ("reading", "encoding", "both", "plain"):
            options = ("side", "spots", "encoder", "workers")
            words = [word for name in options for word in (f"--{name}", str(getattr(args, name)))]
            words = [sys.executable, __file__, "--measure", what, "--slide", str(slide), *words]
            results[what] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
            told = results[what]
            print(
                f"{what:>9}: {told['rate']:7.1f} patches/s, {told['mib']:6.0f} MiB beside the encoder, "
                f"a reading process {told['worker_mib']:.0f} MiB",
                flush=True,
            )
        if not args.memory:
            rates = {what: told["rate"] for what, told in results.items()}
            slower = min(rates["reading"], rates["encoding"])
            print(f"both / slower of the two: {rates['both'] / slower:.2f}")
            print(f"both / plain: {rates['both'] / rates['plain']:.2f}")


if __name__ == "__main__":
    main()
