"""What every model of the folder must do, at toy size: learn, and bear sections of any shape."""

import json
from dataclasses import fields

import pytest
import torch

from genar.errors import InputError
from genar.models import Decoding, Spots, model_class, model_names
from genar.models._base import LN2, Card
from genar.training import TrainConfig, fit, train_config_from_dict
from toy_models import GRADIENT, N_GENES, fresh, log2_values, made, prepared, section, training

IDLE = {
    "genar": {"start", "history_position"},  # of the published history of tokens, which ``small`` does not have
    "egn": {"exemplar_norm.weight", "exemplar_norm.bias"},  # of the last layer, whose exemplars nothing reads
}


def mean_loss(model, batches):
    """Of the same draws at each call."""
    with torch.no_grad():
        torch.manual_seed(1)
        return torch.stack([model.loss(batch).total for _ in range(4) for batch in batches]).mean()


@pytest.mark.parametrize("name", GRADIENT)
def test_the_loss_falls_within_a_few_dozen_steps(name):
    model, spots = fresh(name).train(), training()
    # both a model of spots and one of sections take a section at a time
    batches = [spots.batch(spots.section == key) for key in spots.section.unique()]
    before = mean_loss(model, batches)
    assert torch.isfinite(before)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        model.loss(batches[step % 2]).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = mean_loss(model, batches)
    assert torch.isfinite(after)
    assert after < before


@pytest.mark.parametrize("name", GRADIENT)
def test_every_weight_is_used(name):
    """A weight without a gradient is a part that was built and forgotten."""
    model, spots = fresh(name).train(), training()
    model.loss(spots.batch(spots.section == 1)).total.backward()
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not {n for n in unused if not n.endswith(tuple(IDLE.get(name, ["/"])))}


@pytest.mark.parametrize("name", model_names())
def test_an_isolated_spot_leaves_all_others_finite(name):
    spots = section(6, 5, key=3)
    spots.coords_um[7] += 1_000_000
    model = prepared(name)
    assert torch.isfinite(log2_values(model, spots)).all()
    if model.gradient:
        with torch.no_grad():
            assert torch.isfinite(model.loss(spots.batch()).total)


@pytest.mark.parametrize("name", model_names())
def test_spots_in_one_place_are_finite(name):
    spots = section(3, 2, key=3)
    spots.coords_um[:] = 500.0
    spots.coords_unit[:] = 0.0
    assert torch.isfinite(log2_values(prepared(name), spots)).all()


@pytest.mark.parametrize("name", model_names())
def test_a_section_of_5000_spots_is_predicted(name):
    spots = section(100, 50, key=3)
    values = log2_values(prepared(name), spots)
    assert values.shape == (len(spots), N_GENES)
    assert torch.isfinite(values).all()
    assert (values >= 0).all()


@pytest.mark.parametrize("name", model_names())
def test_the_order_of_spots_and_what_else_is_predicted_change_nothing(name):
    model, one, two = prepared(name), section(6, 5, key=3), section(4, 4, key=4)
    alone = log2_values(model, one)
    order = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log2_values(model, one.rows(order)), alone[order], atol=1e-5, rtol=1e-5)
    joined = log2_values(model, Spots.join([two, one]))
    torch.testing.assert_close(joined[len(two) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", model_names())
def test_a_prediction_neither_needs_counts_nor_changes_the_model(name):
    model, spots = prepared(name), section(4, 4, key=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, again = log2_values(model, spots), log2_values(model, spots)
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", model_names())
def test_facts_and_state_make_the_same_model(name):
    model, spots = prepared(name), section(4, 4, key=3)
    facts = json.loads(json.dumps(model.facts()))
    again = model_class(name).from_facts(facts)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(log2_values(again.eval(), spots), log2_values(model, spots), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", model_names())
def test_cards_recipes_and_presets_are_whole(name):
    cls = model_class(name)
    train_config_from_dict({}, own=cls.train_defaults)
    if cls.card is not None:
        said = {field.name: getattr(cls.card, field.name) for field in fields(Card)}
        assert all(said[part] for part in ("title", "target", "kept"))
    with pytest.raises(InputError, match="wings"):
        cls.check_settings("small", {"wings": 2})
    for preset in getattr(cls, "presets", {}):
        cls.check_settings(preset, {})


@pytest.mark.filterwarnings("ignore:bf16 will be slower")
@pytest.mark.parametrize("name", GRADIENT)
def test_every_model_trains_in_bf16(name):
    model = made(name, training())
    fit(model, training(), TrainConfig(max_epochs=1, batch_size=16, precision="bf16"), device="cpu")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", ["ridge", "genar", "bleep", "knn"])
def test_a_channel_all_but_dead_in_training_does_not_outshout_the_others(name):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(120, 1, 30, generator=random)
    x[:, :, 7] = 0
    x[3, :, 7] = 2e-6
    counts = torch.poisson((x[:, 0, :10] + 1.5).exp2(), generator=random).long()
    places = torch.cartesian_prod(torch.arange(12.0), torch.arange(10.0))
    train = Spots(x, 100 * places, places / 12, torch.arange(120), torch.zeros(120).long(), counts)
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 1, "heads": 2, "components": 8} if name == "genar" else {}
    model = model_class(name).create(30, train, "small", settings)
    fit(model, train, TrainConfig(max_epochs=0 if name == "genar" else 1, validation_share=0.0), device="cpu")
    loud = x[:20].clone()
    loud[:, :, 7] = 0.05  # 25,000 times what it was in training, and next to nothing beside the others
    how = Decoding("mean", layers=("log1p_mean",))
    found = []
    for seen in (x[:20], loud):
        asked = Spots(seen, 100 * places[:20], places[:20] / 12, torch.arange(20), torch.ones(20).long())
        found.append(model.predict(asked.batch(), how).layers["log1p_mean"] / LN2)
    assert (found[1] - found[0]).abs().max() < 0.5
