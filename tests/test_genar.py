"""GenAR: what a position sees, what its loss and its counts are, at any scales."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from genar.errors import InputError
from genar.genes import Scales, default_sizes
from genar.models import Batch, Decoding, Spots, _cosine_attention
from genar.models._cosine_attention import Cache, as_it_comes, cosine_attention
from genar.models._genar_heads import log_frequencies
from genar.models._genar_parts import bf16_products, count_bumps, position_code
from genar.models._training_spots import auto_max_count
from genar.models.genar import GenAR, paper, released, small
from genar.training import TrainConfig, fit
from small_genar import N_FEATURES, N_GENES, TINY, VARIANTS, make_model, make_spots
from toy_models import made, training

WRONG_LOSS = {"output": "continuous", "final_loss": "cross_entropy"}
DESIGNS = [
    (200,), (1, 20, 200), (1, 40, 100, 200), (1, 4, 8, 40, 100, 200), (1, 8, 40, 200), (1, 4, 20, 100, 200),
    (1, 2, 4, 8, 40, 100, 200), default_sizes(50), default_sizes(777), (1, 5000),
]  # fmt: skip


@pytest.fixture(params=VARIANTS)
def model(request):
    return make_model(VARIANTS[request.param])


def largest_difference(a, b):
    return max(float(((a.layers[n] - b.layers[n]).abs() / (1 + b.layers[n].abs())).max()) for n in a.layers)


@pytest.mark.parametrize("decode", ["greedy", "mean"])
def test_cached_generation_equals_uncached(model, decode):
    batch = make_spots().batch()
    cached = model.generate(batch, Decoding(decode, 3))
    uncached = model.generate(batch, Decoding(decode, 3), cache=False)
    assert torch.equal(cached.point, uncached.point)
    assert largest_difference(cached, uncached) < 1e-4


@torch.no_grad()
def test_cached_logits_equal_the_training_pass(model):
    spots = make_spots()
    batch = spots.batch()
    means = model.layout.pool(spots.counts)
    tokens = [mean.round().long() for mean in means[:-1]]
    steering, table = model._steering(model.condition(batch)), model.embed.rows()
    whole = model._trunk(model._sequence(table, tokens, len(spots)), steering, model.layout.cuts)
    caches = [Cache(model.layout.n_cached) for _ in model.blocks]
    for k in range(len(model.sizes)):
        above = tokens[k - 1] if k else torch.zeros(len(spots), 0, dtype=torch.long)
        step = model._cached_pass(k, table, above, steering, caches)
        at = slice(model.layout.interpolated_start[k], model.layout.interpolated_start[k + 1])
        assert (step - whole[:, at]).abs().max() < 1e-5


@pytest.mark.parametrize("decode", ["greedy", "mean"])
@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_and_order_never_change_a_prediction(model, decode, size):
    spots = make_spots()
    whole = model.predict(spots.batch(), Decoding(decode, 4))
    order = torch.randperm(len(spots), generator=torch.Generator().manual_seed(0))
    for rows in order.split(size):
        part = model.predict(spots.batch(rows), Decoding(decode, 4))
        assert torch.equal(part.point, whole.point[rows])
        for name, values in part.layers.items():
            torch.testing.assert_close(values, whole.layers[name][rows], atol=1e-5, rtol=1e-5)


def test_no_position_sees_a_finer_or_its_own_token(model):
    """Changing the tokens of scale k changes nothing at scales up to k, and something beyond."""
    spots = make_spots()
    batch = spots.batch()
    steering, table = model._steering(model.condition(batch)), model.embed.rows()
    tokens = [mean.round().long() for mean in model.layout.pool(spots.counts)[:-1]]
    before = model._trunk(model._sequence(table, tokens, len(batch.features)), steering, model.layout.cuts)
    for k in range(len(tokens)):
        changed = [t.clone() for t in tokens]
        changed[k] = (changed[k] + 3) % 32
        after = model._trunk(model._sequence(table, changed, len(batch.features)), steering, model.layout.cuts)
        difference = (after - before).abs().amax(dim=(0, 2))
        border = model.layout.interpolated_start[k + 1]
        assert difference[model.layout.interpolated_start[0] : border].max() == 0
        assert difference[border:].max() > 0


def test_positions_number_as_the_design_says():
    scales = Scales(tuple(range(200)), default_sizes(200))
    assert sum(cut.n_queries for cut in GenAR(small(n_features=8, max_count=7), scales).layout.cuts) == 353
    tokens = GenAR(small(n_features=8, max_count=7, history="tokens"), scales)
    assert sum(cut.n_queries for cut in tokens.layout.cuts) == 507


def test_pooling_agrees_with_scales_and_conserves_totals():
    spots, model = make_spots(), make_model()
    for k, pooled in enumerate(model.layout.pool(spots.counts)):
        np.testing.assert_allclose(pooled.numpy(), model.scales.pool(spots.counts.numpy(), k), rtol=1e-6)
        sizes = torch.from_numpy(np.diff(model.scales.edges(k)))
        torch.testing.assert_close((pooled * sizes).sum(dim=1), spots.counts.sum(dim=1).float())


def test_loss_is_finite_and_falls(model):
    model.train()
    batch = make_spots().batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(batch)
        assert torch.isfinite(loss.total)
        torch.testing.assert_close(loss.total, loss.per_scale.mean())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_every_weight_takes_part(model):
    model.train()
    model.loss(make_spots().batch()).total.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    allowed = {"start", "history_position"} if model.config.history == "queries" else set()
    assert unused <= allowed


# -- configuration --------------------------------------------------------------------------------------------------


def test_published_presets():
    assert (paper().width, paper().depth, paper().heads, paper().max_count) == (768, 8, 8, 2000)
    assert released() == replace(paper(), width=512)
    assert paper().history == "tokens"
    assert paper().feature_dropout == paper().token_noise == paper().components == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"history": "both"},
        {"width": 10, "heads": 4},
        {"dropout": 1.0},
        {"depth": 0},
        {"token_noise": -1.0},
        {"components": 0},
        WRONG_LOSS,
    ],
)
def test_senseless_configurations_are_refused(changes):
    with pytest.raises(InputError):
        small(**changes)


def test_unknown_settings_and_presets_are_refused():
    with pytest.raises(InputError, match="widht"):
        GenAR.check_settings("small", {"widht": 3})
    with pytest.raises(InputError, match="huge"):
        GenAR.check_settings("huge", {})


def test_create_orders_genes_and_sizes_classes():
    spots = make_spots()
    model = GenAR.create(N_FEATURES, spots, "small", {"width": 16, "depth": 1, "heads": 2, "scales": (1, 6, N_GENES)})
    assert model.sizes == (1, 6, N_GENES)
    assert model.config.max_count == auto_max_count(spots.counts)
    assert model.config.max_count >= int(spots.counts.max())
    again = GenAR.from_facts(model.facts())
    assert again.config == model.config
    assert again.scales == model.scales


def test_counts_above_the_cap_are_capped():
    model, spots = make_model(), make_spots()
    high = replace(spots, counts=spots.counts * 1000)
    assert torch.isfinite(model.loss(high.batch()).total)


@pytest.mark.parametrize("sizes", DESIGNS)
def test_any_scale_design_trains_and_generates(sizes):
    torch.manual_seed(0)
    config = paper(n_features=4, width=8, depth=1, heads=1, max_count=7)
    model = GenAR(config, Scales(tuple(range(sizes[-1])), sizes))
    counts = torch.randint(0, 8, (2, sizes[-1]))
    batch = Batch(torch.randn(2, 4), torch.rand(2, 2), torch.rand(2, 2), torch.arange(2), counts)
    loss = model.loss(batch)
    loss.total.backward()
    assert loss.per_scale.shape == (len(sizes),)
    assert model.eval().generate(batch).point.shape == counts.shape


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        model = make_model(replace(TINY, recompute=recompute, dropout=0.0, drop_path=0.0, feature_dropout=0.0)).train()
        model.loss(make_spots().batch()).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("variant", ["default", "tokens", "causal", "tokens-causal"])
def test_attention_trained_on_a_cpu_is_the_automatic_one(variant, keeps, monkeypatch):
    """Output and gradient of the kernels and of the written products, these with the weights kept for the backward pass
    and made again, in chunks of a few heads."""
    monkeypatch.setattr(_cosine_attention, "_CHUNK_WEIGHTS", 3 * 24 * 24)
    monkeypatch.setattr(_cosine_attention, "_MOST_KEPT", 1 << 20 if keeps else 0)
    cuts = make_model(VARIANTS[variant]).layout.cuts
    length = sum(cut.n_queries for cut in cuts)
    qkv, sharpness = torch.randn(5, length, 3 * 16).requires_grad_(), torch.tensor([2.0, 9.0]).requires_grad_()
    slope = torch.randn(5, length, 16)
    automatic = cosine_attention(qkv.double(), sharpness.double(), cuts)
    theirs = torch.autograd.grad(automatic, (qkv, sharpness), slope.double())
    for function in (_cosine_attention._Fused, _cosine_attention._Written):
        mine = function.apply(qkv, sharpness, list(cuts))
        torch.testing.assert_close(mine, automatic.float())
        torch.testing.assert_close(torch.autograd.grad(mine, (qkv, sharpness), slope), theirs, rtol=1e-4, atol=1e-5)

    assert "_Fused" in type(cosine_attention(qkv, sharpness, cuts).grad_fn).__name__
    low = qkv.detach().bfloat16().requires_grad_()
    assert "_Written" in type(cosine_attention(low, sharpness, cuts).grad_fn).__name__  # what training in bf16 runs
    mine = torch.autograd.grad(cosine_attention(low, sharpness, cuts), (low, sharpness), slope.bfloat16())
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype in (torch.bfloat16, torch.float32)
        assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("linear_start", [True, False])
def test_bf16_changes_loss_gradient_and_prediction_little(linear_start):
    config = replace(TINY, dropout=0.0, drop_path=0.0, feature_dropout=0.0, linear_start=linear_start)
    model, batch = make_model(config), make_spots().batch()
    losses, gradients = [], []
    for precise in (True, False):
        model.zero_grad()
        with as_it_comes("cpu") if precise else bf16_products("cpu"):
            loss = model.loss(batch).total
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    model.eval()
    made = [model.predict(batch, Decoding("mean", samples=4, bf16=bf16)).layers["log1p_mean"] for bf16 in (False, True)]
    assert 0 < (made[0] - made[1]).abs().mean() < 0.05


def test_scale_weights_weigh_the_scales():
    batch = make_spots().batch()
    per_scale = make_model().loss(batch).per_scale
    first = make_model(replace(TINY, scale_weights=(1.0, 0.0, 0.0, 3.0))).loss(batch)
    torch.testing.assert_close(first.total, (per_scale[0] + 3 * per_scale[3]) / 4)


def test_token_noise_moves_the_tokens_of_training_alone():
    model, means = make_model(replace(TINY, token_noise=0.5)), [torch.full((400, 3), 5.0)]
    assert torch.equal(model._noisy(means)[0], means[0])
    model.train()
    noisy = torch.log1p(model._noisy(means)[0]) - math.log(6)
    assert float(noisy.mean(dim=1).std()) == pytest.approx(0.52, abs=0.06)  # shared by a spot
    assert float((noisy - noisy.mean(dim=1, keepdim=True)).std()) == pytest.approx(0.25 * (2 / 3) ** 0.5, abs=0.03)


def test_a_single_scale_works():
    model = make_model(sizes=(N_GENES,))
    assert model.loss(make_spots().batch()).per_scale.shape == (1,)
    assert model.generate(make_spots().batch()).point.shape == (20, N_GENES)


def test_frequency_start_predicts_the_training_distribution():
    means = torch.tensor([[3.0, 0.0]] * 50)
    p = log_frequencies(means, 31).softmax(dim=1)
    assert p[0].argmax() == 3
    assert p[1, 0] > 0.5
    torch.testing.assert_close(p.sum(dim=1), torch.ones(2))


def test_bumps_sum_to_one_and_small_counts_stay_apart():
    bumps = count_bumps(512, 32)
    torch.testing.assert_close(bumps.sum(dim=1), torch.ones(512))
    assert torch.linalg.matrix_rank(bumps[:4]) == 4


def test_position_code_tells_neighbours_apart_by_pitch_only():
    pitch = position_code(torch.tensor([[10.0, 10.0], [12.0, 10.0]]))
    unit = position_code(torch.tensor([[0.50, 0.50], [0.52, 0.50]]))
    assert (pitch[0] - pitch[1]).norm() > 10 * (unit[0] - unit[1]).norm()


def test_one_position_and_one_spot_a_step_train_in_bf16():
    spots = training()
    spots = Spots(
        spots.features, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section, spots.counts[:, :1]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bf16 will be slower")
        fit(made("genar", spots), spots, TrainConfig(max_epochs=1, batch_size=1, precision="bf16"), device="cpu")


def test_one_huge_count_does_not_make_a_class_of_each():
    spots = training()
    counts = spots.counts.clone()
    counts[3, 2] = 5_000_000
    spots = Spots(spots.features, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section, counts)
    with pytest.warns(UserWarning, match=r"counts up to 5,000,000 are taken for 16,383; set max_count=8388607"):
        model = made("genar", spots)
    assert model.config.max_count == 16383
    fit(model, spots, TrainConfig(max_epochs=1), device="cpu")
    assert int(model.predict(spots.batch()).point.max()) <= 16383


def test_a_regressed_value_never_leaves_the_counts():
    spots = training()
    model = made("genar", spots, output="continuous", final_loss="squared_error", max_count=63)
    fit(model, spots, TrainConfig(max_epochs=1), device="cpu")
    far = Spots(spots.features * 1000, spots.coords_um, spots.coords_unit, spots.spot_ids, spots.section)
    counts = model.predict(far.batch())
    assert 0 <= int(counts.point.min()) <= int(counts.point.max()) == 63
