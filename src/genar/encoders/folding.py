"""Batch norms folded into the convolutions before them: the same features, sooner."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-4  # of the largest value that comes out
_SMALL_PX = 64  # of the patch that both are tried on, where the network takes one so small


def fold_norms(network: nn.Module, input_px: int) -> nn.Module:
    """A copy without the batch norms that stand behind a convolution, ready to predict; the network itself where there
    are none, or where a patch shows that something else stood between."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
        return network
    folded = copy.deepcopy(network.eval())
    if not sum(_fold(parent) for parent in list(folded.modules())):
        return network
    try:
        patch, expected = _tried(network, min(_SMALL_PX, input_px))
    except Exception:  # whatever a network says of a size that it does not take
        patch, expected = _tried(network, input_px)
    with torch.inference_mode():
        close = torch.allclose(folded(patch), expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()))
    return folded if close else network


@torch.inference_mode()
def _tried(network: nn.Module, px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch [1, 3, px, px] and its feature."""
    patch = torch.rand(1, 3, px, px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return patch, network(patch)


@torch.no_grad()
def _fold(parent: nn.Module) -> int:
    """How many norms of its own children were folded, each into the child before it."""
    n_folded, conv = 0, None
    for name, norm in list(parent.named_children()):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and norm.num_features == conv.out_channels:
            mean, variance = norm.running_mean, norm.running_var
            if mean is not None and variance is not None:
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, getattr(norm, "act", nn.Identity()))  # timm's norms carry the activation
                n_folded += 1
        conv = norm
    return n_folded
