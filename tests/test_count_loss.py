"""Losses of counts: their targets, their sums, their gradients."""

import numpy as np
import pytest
import torch

from genar.models._count_loss import (
    count_kl,
    cross_entropy,
    gaussian_nll,
    gaussian_table,
    summed,
    table_kl,
    two_point_kl,
)


def dense_kl(logits, target):
    return (torch.special.xlogy(target, target) - target * logits.log_softmax(dim=-1)).sum(dim=-1)


def test_gaussian_target_is_the_renormalised_one():
    torch.manual_seed(0)
    logits, mean = torch.randn(5, 7, 60), torch.rand(5, 7) * 59
    sigma = 0.01 * mean + 1
    z = (torch.arange(60) - mean[..., None]) / sigma[..., None]
    dense = dense_kl(logits, (-0.5 * z.double().square()).softmax(dim=-1).float())
    torch.testing.assert_close(count_kl(logits, mean, sigma), dense, atol=1e-5, rtol=1e-5)


def test_looked_up_targets_equal_the_computed_ones():
    torch.manual_seed(0)
    logits, count = torch.randn(5, 7, 60), torch.randint(0, 60, (5, 7)).float()
    found = table_kl(logits, count, gaussian_table(60, 0.5, 0.1, logits))
    torch.testing.assert_close(found, count_kl(logits, count, 0.1 * count + 0.5), atol=1e-5, rtol=1e-5)


def test_two_point_target_at_whole_fractional_and_largest_counts():
    logits = torch.randn(1, 4, 6)
    mean = torch.tensor([[0.0, 2.25, 4.9, 5.0]])
    target = torch.zeros(1, 4, 6)
    for i, m in enumerate(mean[0].tolist()):
        low = min(int(m), 5)
        target[0, i, low] += 1 - (m - low)
        target[0, i, min(low + 1, 5)] += m - low
    found = two_point_kl(logits, mean)
    torch.testing.assert_close(found, dense_kl(logits, target))


def test_cross_entropy_and_gaussian_nll_equal_torch_s():
    torch.manual_seed(0)
    logits, count = torch.randn(3, 4, 9), torch.randint(0, 9, (3, 4)).float()
    sigma = torch.rand(3, 4) + 0.5
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), count.flatten().long(), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, count).flatten(), expected)
    mean = (logits.softmax(dim=2) * torch.arange(9)).sum(dim=2)
    expected = -torch.distributions.Normal(mean, sigma).log_prob(count)
    torch.testing.assert_close(gaussian_nll(logits, count, sigma), expected)


@pytest.mark.parametrize("one_bias", [True, False])
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_summed_loss_and_its_gradient_equal_the_plain_ones(monkeypatch, chunk, one_bias):
    monkeypatch.setattr("genar.models._count_loss._CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    shapes = (6, 3, 4), (20, 4), (1 if one_bias else 3, 20)
    read, head, bias = tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    targets = torch.full((6, 3), 4.0), torch.ones(6, 3)
    plain = count_kl(read @ head.T + bias, *targets).sum() * 2
    found = summed(count_kl, *tensors, *targets) * 2
    torch.testing.assert_close(found, plain)
    for one, other in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(plain, tensors), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.grad(summed(count_kl, read.detach(), head.detach(), bias, *targets), bias)[0].abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(2 * summed(count_kl, *tensors, *targets), plain)


@pytest.mark.real
def test_golden_losses(shared):
    golden = np.load(shared / "golden" / "genar_losses.npz")
    total = 0.0
    for k in range(6):
        logits = torch.from_numpy(golden[f"logits_{k}"].astype(np.float32))
        if k < 5:
            kl = two_point_kl(logits, torch.from_numpy(golden[f"pooled_{k}"]).float())
        else:
            counts = torch.from_numpy(golden["counts"]).float()
            kl = count_kl(logits, counts, 0.01 * counts + 1)
        loss = float(kl.sum()) / 3
        assert loss == pytest.approx(float(golden[f"loss_{k}"]), rel=1e-4)
        total += loss / 6
    assert total == pytest.approx(float(golden["loss_total"]), rel=1e-4)


@pytest.mark.real
def test_golden_gaussian_targets(shared):
    """KL to the golden target's own logarithm is zero only if our target is the same."""
    golden = np.load(shared / "golden" / "genar_losses.npz")
    mean = torch.from_numpy(golden["gauss_mu"]).float()
    target = torch.from_numpy(golden["gauss_target"]).float()[None]
    logits = target.clamp(min=1e-30).log()
    kl = count_kl(logits, mean, 0.01 * mean + 1)
    assert kl.abs().max() < 1e-5
