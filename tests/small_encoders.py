"""Rows of the table of encoders, cut to sizes that tests can build, with random weights."""

from dataclasses import replace

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from genar.encoders import ENCODERS, build_network

BIG = [name for name, row in ENCODERS.items() if row.n_parameters > 50_000_000]


def small(name):
    """The row with one block and four by four patches where the whole would take gigabytes and minutes; every width,
    head and patch as published."""
    row = ENCODERS[name]
    if name not in BIG:
        return row
    ours = row.library == "timm"
    side_px = 4 * row.arguments.get("patch_size", 16 if "patch16" in row.architecture else 14)
    depth, size = ("depth", "img_size") if ours else ("num_hidden_layers", "image_size")
    return replace(row, input_px=side_px, arguments={**row.arguments, depth: 1, size: side_px})


def random_network(row, seed=0):
    torch.manual_seed(seed)
    return build_network(row)


def random_timm(name, seed=0, **changes):
    """The architecture of a row of timm's, as timm makes it."""
    torch.manual_seed(seed)
    return timm.create_model(ENCODERS[name].architecture, pretrained=False, **{"num_classes": 0, **changes})


def write_resnet18(folder):
    """Its weights with a classifier, as on the hub."""
    save_file(random_timm("resnet18", num_classes=10).state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def random_patches(row, n):
    return np.random.default_rng(0).integers(0, 255, (n, row.input_px, row.input_px, 3), np.uint8)
