"""BLEEP, and the look-up that it shares with other methods."""

import pytest
import torch

from genar.errors import InputError
from genar.models import Batch, Spots
from genar.models._base import LN2, log2p1
from genar.models._retrieval import Keys
from genar.models.bleep import BLEEP, BLEEPConfig, ProjectionHead, soft_contrast
from genar.training import TrainConfig, fit, train_config_from_dict
from toy_models import made, training


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones():
    assert parameters(BLEEP(1024, 200, BLEEPConfig())) == 446_464
    with torch.device("meta"):
        from torchvision.models import resnet50

        backbone = resnet50(weights=None)
        backbone.fc = torch.nn.Identity()
        heads = [ProjectionHead(n, 256, 0.1) for n in (2048, 3467)]
    assert parameters(backbone) + sum(map(parameters, heads)) == 25_052_992


def toy(n=60, genes=6, features=5, sections=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, features, generator=random)
    rate = torch.exp(2 + x[:, 0, :1] * torch.linspace(0.3, 1, genes))
    section = torch.arange(n) * sections // n
    xy = torch.rand(n, 2, generator=random) * 1000
    return Spots(x, xy, xy / 1000, torch.arange(n), section, torch.poisson(rate, generator=random).long())


def ready(spots, **settings):
    torch.manual_seed(0)
    model = BLEEP.create(spots.features.shape[2], spots, "small", settings)
    model.prepare(spots)
    return model.eval()


def elsewhere(batch):
    """The same spots as of a section that is no key's."""
    return Batch(**{**vars(batch), "section": torch.full_like(batch.section, 99)})


def test_the_mean_of_all_keys_is_the_training_mean():
    spots = toy()
    predicted = ready(spots, neighbours=60).predict(elsewhere(spots.batch())).layers["log1p_mean"] / LN2
    torch.testing.assert_close(predicted, log2p1(spots.counts).mean(dim=0).expand(60, -1))


def test_keys_queried_with_themselves_return_themselves():
    spots = toy()
    for weighting in ("average", "distance"):
        model = ready(spots, neighbours=1, weighting=weighting)
        with torch.no_grad():
            found = model.retrieve(model.key_embeddings(), torch.ones(60, 60, dtype=torch.bool))
        torch.testing.assert_close(found, log2p1(spots.counts))


def test_distance_weights_lean_on_the_nearest():
    spots = toy()
    model = ready(spots, neighbours=10, weighting="distance")
    queries, nearest = torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    torch.testing.assert_close(
        model.weights(queries, nearest, nearest[..., 0] > -1), torch.tensor([[1.0, 0.0498]]), atol=1e-4, rtol=0
    )


def test_permuting_the_keys_changes_nothing():
    spots, query = toy(), elsewhere(toy(seed=1).batch())
    one, two = ready(spots, neighbours=7), ready(spots, neighbours=7)
    two.keys.hold(spots.rows(torch.randperm(60)))
    torch.testing.assert_close(one.predict(query).layers["log1p_mean"], two.predict(query).layers["log1p_mean"])


def test_soft_targets_follow_the_formula():
    image, expression = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    expected, tau = 0.0, 2.0
    logits = [[float(e @ i) / tau for i in image] for e in expression]
    target = [
        torch.tensor([float(image[a] @ image[b] + expression[a] @ expression[b]) / 2 / tau for b in (0, 1)]).softmax(0)
        for a in (0, 1)
    ]
    for a in (0, 1):
        for b in (0, 1):
            row, column = torch.tensor(logits[a]), torch.tensor([logits[0][a], logits[1][a]])
            expected -= float(target[a][b] * row.log_softmax(0)[b] + target[b][a] * column.log_softmax(0)[b]) / 4
    assert float(soft_contrast(image, expression, tau)) == pytest.approx(expected, rel=1e-5)


def test_training_brings_partners_together():
    spots = toy(n=90)
    model = ready(spots, neighbours=5)
    before = float(model.loss(spots.batch()).total.detach())
    untrained = model.predict(spots.batch())
    fit(model, spots, train_config_from_dict({"max_epochs": 20, "batch_size": 45}, own=BLEEP.train_defaults))
    after = float(model.loss(spots.batch()).total.detach())
    assert after < before / 2
    truth = log2p1(spots.counts)

    def error(counts):
        return float((counts.layers["log1p_mean"] / LN2 - truth).square().mean())

    assert error(model.predict(spots.batch())) < 0.7 * error(untrained)


def test_validation_strips_and_saving_fit_the_keys():
    spots = toy()
    model = BLEEP.create(5, spots, "small", {})
    fit(model, spots, TrainConfig(max_epochs=1, validate_every=1, validation_share=0.2))
    assert model.facts()["n_keys"] == len(model.keys) < 60
    loaded = BLEEP.from_facts(model.facts())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.keys.section, model.keys.section)


def test_embedded_keys_are_forgotten_when_weights_change():
    spots = toy()
    model, other = ready(spots), ready(spots)
    with torch.no_grad():
        old = model.key_embeddings()
        for weight in other.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    model.load_state_dict(other.state_dict())
    assert not torch.equal(model.key_embeddings(), old)


# -- who may see whom -----------------------------------------------------------------------------------------------


def test_no_spot_sees_its_own_section():
    spots = toy()
    model = ready(spots, neighbours=60)
    visible = model.keys.visible(spots.batch())
    assert torch.equal(visible, spots.section[:, None] != spots.section)
    predicted = model.predict(spots.batch()).layers["log1p_mean"] / LN2
    for section in range(3):
        others = log2p1(spots.counts[spots.section != section]).mean(dim=0)
        torch.testing.assert_close(predicted[spots.section == section][0], others)


def test_a_single_section_shows_other_strips_alone():
    spots = toy(sections=1)
    model = ready(spots)
    visible = model.keys.visible(spots.batch())
    assert not visible.diagonal().any()
    assert visible.any(dim=1).all()
    x, strip = spots.coords_um[:, 0], model.keys.strip
    assert strip.bincount().tolist() == [12] * 5
    for spot in range(60):
        hidden = x[~visible[spot]]
        assert hidden.min() <= x[spot] <= hidden.max()
    between = Batch(**{**vars(spots.batch(slice(0, 1))), "coords_um": torch.tensor([[-5.0, 0.0]])})
    assert torch.equal(model.keys.visible(between)[0], strip != 0)


def test_strips_that_touch_hide_both():
    spots = toy(n=20, sections=1)
    spots.coords_um[:, 0] = torch.arange(20) // 10 * 100.0  # two columns, five strips
    keys = Keys(20, 6)
    keys.hold(spots)
    visible = keys.visible(spots.batch())
    assert not visible.diagonal().any()


def test_a_query_without_keys_gets_the_mean_of_all():
    spots = toy(n=1, sections=1)
    predicted = ready(spots).predict(spots.batch()).layers["log1p_mean"] / LN2
    torch.testing.assert_close(predicted, log2p1(spots.counts))


@pytest.mark.parametrize("settings", [{"weighting": "best"}, {"neighbours": 0}, {"depth": 3}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match="bleep"):
        BLEEP.check_settings("small", settings)


def test_keys_that_nobody_may_see_take_no_weight():
    model = made("bleep", training(), weighting="distance")
    queries, nearest = torch.zeros(1, 2), torch.tensor([[[0.1, 0.0], [30.0, 0.0], [31.0, 0.0]]])
    weights = model.weights(queries, nearest, torch.tensor([[False, True, True]]))
    assert float(weights[0, 1]) == pytest.approx(1.0)
