"""EGN."""

import pytest
import torch

from genar.errors import InputError
from genar.models import Spots
from genar.models._base import LN2, log2p1
from genar.models.egn import EGN, EGNConfig, Network, correlation_loss
from genar.training import fit, train_config_from_dict

TINY = {"width": 16, "depth": 3, "heads": 2, "mlp_width": 32, "bridge_heads": 2, "bridge_width": 4}
# An output layer in each of four bridges and a last norm that no result depends on: published, not built here.
NEVER_READ = 4 * (512 * 1024 + 1024) + 2 * 1024


def toy(n=60, sections=3, genes=6):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 5, generator=random)
    rate = torch.exp(2.5 + x[:, 0, :1] * torch.linspace(-1, 1, genes))
    xy = torch.rand(n, 2, generator=random) * 1000
    section = torch.arange(n) * sections // n
    return Spots(x, xy, xy / 1000, torch.arange(n), section, torch.poisson(rate, generator=random).long())


def ready(spots, **settings):
    torch.manual_seed(0)
    model = EGN.create(5, spots, "small", {**TINY, **settings})
    model.prepare(spots)
    return model.eval()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(7, 4, 5, 6, EGNConfig(**TINY)).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 7), torch.randn(3, 5), torch.randn(3, 6, 5), torch.randn(3, 6, 6), torch.ones(3, 6).bool()


def test_size_is_the_published_one():
    with torch.device("meta"):
        published = Network(32 * 32 * 3, 64, 2048, 250, EGNConfig())
    assert sum(p.numel() for p in published.parameters()) + NEVER_READ == 133_356_794


def test_every_weight_gets_a_gradient(network, inputs):
    network(*inputs).square().sum().backward()
    unread = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    # nobody reads the exemplars after the last bridge
    assert unread == {"layers.2.bridge.exemplar_norm.weight", "layers.2.bridge.exemplar_norm.bias"}


def test_the_order_of_exemplars_changes_nothing(network, inputs):
    tokens, feature, others, expression, there = inputs
    order = torch.randperm(6)
    straight = network(*inputs)
    permuted = network(tokens, feature, others[:, order], expression[:, order], there)
    torch.testing.assert_close(straight, permuted, atol=1e-5, rtol=1e-5)


def test_the_same_exemplar_six_times_is_as_good_as_once(network, inputs):
    tokens, feature, others, expression, there = inputs
    once = network(tokens, feature, others[:, :1], expression[:, :1], there[:, :1])
    six = network(tokens, feature, others[:, :1].expand(-1, 6, -1), expression[:, :1].expand(-1, 6, -1), there)
    torch.testing.assert_close(once, six, atol=1e-5, rtol=1e-5)


def test_absent_exemplars_change_nothing(network, inputs):
    tokens, feature, others, expression, there = inputs
    there = there.clone()
    there[:, 2:] = False
    two = network(tokens, feature, others[:, :2], expression[:, :2], there[:, :2])
    torch.testing.assert_close(network(tokens, feature, others, expression, there), two, atol=1e-5, rtol=1e-5)
    assert network(tokens, feature, others, expression, torch.zeros_like(there)).isfinite().all()


def test_exemplars_are_the_nearest_of_other_sections():
    spots = toy()
    model, batch = ready(spots), spots.batch()
    x = model.standardised(batch.features)
    places, there = model.exemplars(x, batch)
    assert there.all()
    assert (spots.section[places] != spots.section[:, None]).all()
    apart = torch.cdist(x, x).masked_fill(spots.section[:, None] == spots.section, torch.inf)
    assert torch.equal(places.sort(dim=1).values, apart.topk(6, largest=False).indices.sort(dim=1).values)


def test_a_single_section_looks_into_other_strips():
    spots = toy(sections=1)
    model, batch = ready(spots), spots.batch()
    places, _ = model.exemplars(model.standardised(batch.features), batch)
    assert (model.keys.strip[places] != model.keys.strip[:, None]).all()


def test_the_scale_of_the_target_is_undone():
    spots = toy()
    spots.counts[:, 2] = 7  # constant
    model = ready(spots)
    target = model.scaled(log2p1(spots.counts))
    assert float(target.min()) == 0
    assert float(target.max()) == pytest.approx(1)
    torch.testing.assert_close(target * model.target_range + model.target_low, log2p1(spots.counts))


def test_correlation_loss():
    truth = torch.randn(10, 3)
    assert float(correlation_loss(2 * truth + 1, truth)) == pytest.approx(0, abs=1e-5)
    assert float(correlation_loss(-truth, truth)) == pytest.approx(2, abs=1e-5)
    flat = torch.zeros(10, 3, requires_grad=True)
    loss = correlation_loss(flat, truth)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1)
    assert flat.grad.isfinite().all()


def test_training_learns_what_the_features_tell():
    spots = toy(n=90)
    model = ready(spots)
    fit(model, spots, train_config_from_dict({"lr": 5e-3, "warmup_steps": 5, "max_epochs": 10}, own=EGN.train_defaults))
    predicted = model.predict(spots.batch()).layers["log1p_mean"] / LN2
    truth = log2p1(spots.counts)
    assert float((predicted - truth).square().mean()) < 0.5 * float((truth - truth.mean(dim=0)).square().mean())


@pytest.mark.parametrize("settings", [{"width": 18, "heads": 4}, {"exemplars": 0}, {"k": 3}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match="egn"):
        EGN.check_settings("small", settings)
