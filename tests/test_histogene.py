"""HisToGene: its sizes, and that order means nothing while place does."""

import pytest
import torch

from genar.errors import InputError
from genar.models import Spots
from genar.models.histogene import HisToGene

N_FEATURES, N_GENES = 6, 5
TINY = {"width": 16, "heads": 2, "head_width": 8, "hidden": 16}


def section(n_columns=7, n_rows=6):
    torch.manual_seed(0)
    coords = torch.cartesian_prod(torch.arange(n_columns).float(), torch.arange(n_rows).float()) * 200
    n = len(coords)
    x = torch.randn(n, 1, N_FEATURES)
    counts = torch.poisson(torch.exp(1 + x[:, 0, :N_GENES])).long()
    return Spots(x, coords, coords / coords.max(), torch.arange(n), torch.ones(n).long(), counts)


def model(spots, **settings):
    torch.manual_seed(1)
    made = HisToGene.create(N_FEATURES, spots, "small", {**TINY, **settings})
    made.prepare(spots)
    return made.eval()


@pytest.mark.parametrize(
    ("changes", "n_genes", "n_parameters"),
    [
        ({"depth": 4, "input": "patches"}, 1000, 73_281_512),
        ({"input": "patches"}, 785, 106_648_337),
        ({}, 200, 68_562_120),
    ],
)
def test_published_sizes(changes, n_genes, n_parameters):
    network = HisToGene(1024, n_genes, HisToGene.configure("official", changes))
    assert sum(p.numel() for p in network.parameters()) == n_parameters


def test_permuting_spots_with_their_places_permutes_outputs():
    spots = section()
    made, order = model(spots), torch.randperm(len(spots))
    torch.testing.assert_close(made(spots.rows(order).batch()), made(spots.batch())[order], atol=1e-5, rtol=1e-5)


def test_place_and_company_change_a_prediction():
    spots = section()
    made = model(spots)
    whole = made(spots.batch())
    part = made(spots.rows(torch.arange(20)).batch())
    assert (part - whole[:20]).abs().max() > 1e-4
    spots.features[:] = spots.features[:1]
    assert made(spots.batch()).std(dim=0).min() > 1e-4


def test_columns_beyond_the_table_share_its_last_row():
    spots = section()
    made = model(spots, n_positions=3)
    assert torch.isfinite(made(spots.batch())).all()


def test_the_network_on_pixels_trains_and_predicts():
    spots = section(2, 2)
    spots.patches = torch.randint(0, 256, (4, 1, 3, 224, 224), dtype=torch.uint8)
    made = model(spots, input="patches")
    made.train().loss(spots.batch()).total.backward()
    assert made.token.weight.grad.abs().sum() > 0
    assert made.token.in_features == 37_632
    assert made.eval()(spots.batch()).shape == (4, N_GENES)
    with pytest.raises(InputError, match="patches"):
        model(section(2, 2), input="patches")
