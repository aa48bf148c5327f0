"""A device that is not there: tensors that say they lie on ``far``, computed on the CPU, which refuse to meet those
that say ``cpu``, as a GPU's do. So what GPUs need is tried where there is none.

PyTorch cannot forget the device again: ``python far_device.py`` tries everything in a process of its own and prints a
JSON object, what was tried -> the largest difference from the CPU, or what went wrong.
"""

import copy
import json
import sys
import tempfile
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from anndata import read_h5ad
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = "far:0"
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")  # between devices
_INDICES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")  # those may lie on the CPU


class Far(torch.Tensor):
    """``near`` is the tensor on the CPU that holds the numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            layout=near.layout, requires_grad=near.requires_grad, device=torch.device(FAR),
        )  # fmt: skip
        far.near = near
        return far

    def __repr__(self, **_):
        return f"Far({self.near!r})"

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Catches ``torch.zeros(…, device="far:0")`` and the like."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _near(x):
    return x.near if isinstance(x, Far) else x


def _run(func, args, kwargs):
    """The operation on the CPU; its result lies where a GPU's would."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = any(isinstance(x, Far) for x in tensors)
    may_meet = name in _COPIES or (name in _INDICES and isinstance(tensors[0], Far))
    if far and not may_meet and any(not isinstance(x, Far) and x.dim() for x in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {FAR} and cpu")
    for device in (x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)):
        far = device.type == "far"
    args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
    kwargs = {key: torch.device("cpu") if isinstance(x, torch.device) else x for key, x in kwargs.items()}
    if name == "aten::copy_":
        far = isinstance(tensors[0], Far)
    made = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    given = {
        id(_near(x)): x for x in tensors
    }  # what an operation in place returns is the very tensor that it was given

    def placed(x):
        if id(x) in given and isinstance(given[id(x)], Far) == far:
            return given[id(x)]
        return Far(x) if far and isinstance(x, torch.Tensor) else x

    return tree_map(placed, made)


@contextmanager
def far_device():
    """Within, ``far:0`` is a device."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Factories(), sdpa_kernel(SDPBackend.MATH), patch.object(torch, "inference_mode", torch.no_grad):
            yield  # views of such tensors cannot be made in inference mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # test_far_device looks for it
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class FarAccelerator(Accelerator):
    """For Lightning."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(FAR)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "far"


def _plain_lstm(x, hx, weights, bias, n_layers, dropout, trains, both_ways, batch_first):
    """An LSTM in plain operations, [L, B, F] -> [L, B, H] and its last states; devices have kernels of their own."""
    assert (bias, both_ways, batch_first) == (True, False, False)
    last = []
    for layer in range(n_layers):
        (h, c), (w_x, w_h, b_x, b_h), outputs = (part[layer] for part in hx), weights[4 * layer : 4 * layer + 4], []
        for step in x:
            i, f, g, o = (step @ w_x.T + b_x + h @ w_h.T + b_h).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        last.append((h, c))
    return x, *map(torch.stack, zip(*last, strict=True))


def _differ(near, far) -> float:
    assert far.point.device.type == "far"
    far = far.to("cpu")
    pairs = [(near.point.float(), far.point.float()), *((near.layers[name], far.layers[name]) for name in near.layers)]
    return max((a - b).abs().max().item() for a, b in pairs)


def _model(name: str) -> float:
    """A step of training, one in bfloat16, and every decoding."""
    from genar.models import Decoding
    from toy_models import fresh, training

    layers = ("mean", "log1p_mean", "sd", "q05", "q95", "p_zero")
    model = fresh(name).eval()
    batch = training().batch().sections()[0]
    hows = [Decoding(decode=how, samples=4, steps=5, layers=layers) for how in model.decodings]
    bare = replace(batch, counts=None)
    near = [model.predict_sections(bare, how) for how in hows]
    with far_device():
        if model.gradient:
            trained = copy.deepcopy(model).to(FAR).train()
            trained.loss(batch.to(FAR)).total.backward()
            torch.optim.AdamW(trained.parameters()).step()
            with torch.autocast("far", torch.bfloat16):
                trained.loss(batch.to(FAR))
        model.to(FAR)
        with torch.no_grad():
            far = [model.predict_sections(bare.to(FAR), how) for how in hows]
        return max(map(_differ, near, far))


@contextmanager
def _far_trainer():
    """Within, Lightning trains on ``far:0``; a thread reads patches, as processes take longer to start than this."""
    from genar import training, training_loop
    from genar.features import sections

    trainer = pl.Trainer
    there = {"accelerator": "auto", "devices": "auto", "strategy": SingleDeviceStrategy(FAR, FarAccelerator())}
    with (
        patch.object(training.machine, "device", lambda name: name),
        patch.object(training_loop.pl, "Trainer", lambda **options: trainer(**{**options, **there})),
        patch.object(sections, "default_workers", lambda device: 0),
        far_device(),
    ):
        yield


def _fit(name: str) -> float:
    """A whole training with its validation, which ends on the CPU and predicts there."""
    from genar.training import fit, train_config_from_dict
    from toy_models import fresh, log2_values, training

    config = train_config_from_dict({"max_epochs": 2, "batch_size": 16, "validation_share": 0.25})
    near, far, seen = fresh(name), fresh(name), set()
    fit(near, training(), config, device="cpu")
    loss = far.loss
    far.loss = lambda batch: seen.add(batch.features.device.type) or loss(batch)
    with _far_trainer():
        fit(far, training(), config, device=FAR)
    assert seen == {"far"}
    assert far.device.type == "cpu"
    return (log2_values(near, training()) - log2_values(far, training())).abs().max().item()


def _run_of(name: str) -> float:
    """What ``genar train`` and ``genar predict`` do, features and rivals included."""
    from genar.data import read_sections
    from genar.data.simulate import TissueConfig, write_tissue
    from genar.inference import predict_run
    from genar.models.checkpoint import load_checkpoint
    from genar.runs import train_run
    from genar.settings import sort_settings
    from genar.train_plan import TrainPlan

    tiny = {"width": 16, "depth": 1, "heads": 2, "components": 4, "max_epochs": 1, "samples": 2, "widths_um": []}
    with tempfile.TemporaryDirectory() as folder:
        tissue = write_tissue(
            Path(folder, "tissue"), config=TissueConfig(n_rows=4, n_cols=4, n_genes=80, mpp=2.0, counts_per_nucleus=20)
        )
        held_out, made = read_sections(tissue)[1], []
        for device in ("cpu", FAR):
            out = Path(folder, device.partition(":")[0])
            plan = TrainPlan(
                tissue, ("SIM2",), out / "run", name, n_genes=10, views=1, features=out / "features", device=device,
                settings=sort_settings(tiny, name), maps=False,
            )  # fmt: skip
            with _far_trainer() if device == FAR else nullcontext():
                train_run(plan, say=lambda line: None)
                again = predict_run(held_out, load_checkpoint(out / "run"), None, features=out / "features", how={"samples": 2}, device=device)  # fmt: skip # noqa: E501
            made += [read_h5ad(out / "run" / "predictions" / "SIM2.h5ad"), again]
    return max(abs(made[0].layers["mean"] - one.layers["mean"]).max() for one in made[1:])


def _encoder(name: str) -> float:
    from genar.encoders import load_encoder

    pixels = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    near = load_encoder(name)(pixels)
    with far_device():
        return (load_encoder(name, device=FAR)(pixels) - near).abs().max().item()


def main() -> None:
    from genar.models import model_names

    backend_registration._setup_privateuseone_for_python_backend("far", backend_module=_Backend())
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)
    torch._VF.lstm = _plain_lstm  # pyright: ignore
    tried = {f"model {name}": (_model, name) for name in model_names()}
    tried |= {"fit genar": (_fit, "genar"), "fit histogene": (_fit, "histogene")}
    tried["run"] = (_run_of, "genar")
    tried["encoder"] = (_encoder, "efficientnet_lite0")
    wanted, found = sys.argv[1:], {}
    for what, (try_, name) in tried.items():
        if wanted and what not in wanted:
            continue
        try:
            found[what] = float(try_(name))
        except Exception:
            found[what] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
