"""M2OST: its sizes, its token counts, its streams."""

import pytest
import torch

from genar.errors import InputError
from genar.models import Spots
from genar.models.m2ost import M2OST, Layer, M2OSTConfig, Pixels, _middle

N_FEATURES, N_GENES = 6, 5
TINY = {"width": 12, "depth": 2, "hidden": 8, "gate_hidden": 8}


def section(n_columns=7, n_rows=6, pitch=200.0):
    torch.manual_seed(0)
    coords = torch.cartesian_prod(torch.arange(n_columns).float(), torch.arange(n_rows).float()) * pitch
    n = len(coords)
    x = torch.randn(n, 1, N_FEATURES)
    counts = torch.poisson(torch.exp(1 + x[:, 0, :N_GENES])).long()
    return Spots(x, coords, coords / coords.max().clamp(min=1), torch.arange(n), torch.ones(n).long(), counts)


def model(spots, **settings):
    torch.manual_seed(1)
    made = M2OST.create(N_FEATURES, spots, "small", {**TINY, **settings})
    made.prepare(spots)
    return made.eval()


@pytest.mark.parametrize(("depth", "published"), [(4, 7_043_466), (6, 10_028_170)])
def test_published_sizes(depth, published):
    """The official count holds three layer norms a layer that are declared and never used."""
    config = M2OST.configure("official", {"depth": depth, "input": "patches"})
    network = M2OST(512, 250, config)
    unused = depth * 3 * 2 * 192
    assert sum(p.numel() for p in network.parameters()) + unused == published


def test_token_counts():
    network = Pixels(8)
    lengths = [1 + tokens.shape[1] for tokens in network(torch.randn(2, 3, 3, 224, 224))]
    assert lengths == [197, 393, 589]
    assert [1 + length for length in Pixels.lengths] == lengths


def test_the_middles_of_wider_crops_show_what_the_narrower_ones_show():
    """Black outside the middle quarter of the third crop: all of its fine and finest tokens see it."""
    image = torch.zeros(1, 3, 224, 224)
    image[:, :, 84:140, 84:140] = 1
    assert _middle(image, 4).shape[-1] == 56
    assert (_middle(image, 4) == 1).all()
    assert _middle(image, 2).shape[-1] == 112
    assert _middle(image, 2).sum() == image.sum()


def test_streams_are_means_within_one_and_two_pitches():
    spots = section()
    made, batch = model(spots), spots.batch()
    own, one, two = made.streams(batch)
    x, apart = made.standardised(batch.features), torch.cdist(spots.coords_um, spots.coords_um)
    torch.testing.assert_close(own, x)
    for stream, radius in ((one, 200), (two, 400)):
        within = (apart < 1.1 * radius).float()
        torch.testing.assert_close(stream, within @ x / within.sum(dim=1, keepdim=True))


def test_across_streams_nothing_of_the_own_tokens_stays():
    torch.manual_seed(0)
    layer = Layer(M2OSTConfig(**TINY))
    streams = [torch.randn(2, 3, 12) for _ in range(3)]
    said = layer._cross(streams)
    for linear in layer.across:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    assert all((x == 0).all() for x in layer._cross(streams))
    assert all(x.abs().sum() > 0 for x in said)


def test_an_isolated_spot_is_finite_and_stands_for_its_own_surroundings():
    spots = section()
    spots.coords_um[3] += 50_000
    made, batch = model(spots), spots.batch()
    own, one, two = made.streams(batch)
    torch.testing.assert_close(one[3], own[3])
    torch.testing.assert_close(two[3], own[3])
    assert torch.isfinite(made(batch)).all()


def test_the_network_on_pixels_trains_and_predicts():
    spots = section(2, 1)
    spots.patches = torch.randint(0, 256, (2, 3, 3, 224, 224), dtype=torch.uint8)
    made = model(spots, input="patches", depth=1)
    made.train().loss(spots.batch()).total.backward()
    assert all(p.grad is not None for p in made.network.parameters())
    assert made.embed.embeddings[2].layers[1].weight.grad.abs().sum() > 0
    assert made.eval()(spots.batch()).shape == (2, N_GENES)
    spots.patches = spots.patches[:, :1]
    with pytest.raises(InputError, match="expected 3 patches"):
        made(spots.batch())


def test_senseless_settings_are_refused():
    with pytest.raises(InputError, match="multiple"):
        M2OST.configure("small", {"width": 10})
