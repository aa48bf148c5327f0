"""Batches of spots and of sections, shared by processes: each spot is seen once an epoch."""

import pytest
import torch

from genar.batches import SectionLoader, SpotLoader, section_turns
from genar.errors import InputError
from genar.models import Spots, model_class
from genar.training import TrainConfig
from genar.training_loop import _Module
from toy_models import array_spots


def make_spots(n_spots=53, n_sections=3):
    random = torch.Generator().manual_seed(0)
    return Spots(
        torch.randn(n_spots, 2, 4, generator=random), torch.rand(n_spots, 2), torch.rand(n_spots, 2),
        torch.arange(n_spots), torch.arange(n_spots) % n_sections, torch.ones(n_spots, 5).long(),
    )  # fmt: skip


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_every_spot_is_seen_once_an_epoch(n_ranks, n_parts):
    loaders = [SpotLoader(make_spots(), 4, n_parts, 7, lambda: 0, rank, n_ranks) for rank in range(n_ranks)]
    shares = [list(loader) for loader in loaders]
    assert {len(part) for part in shares} == {4 * n_parts}
    ids = torch.cat([share.batch.spot_ids for part in shares for share in part])
    assert sorted(ids.tolist()) == list(range(53))
    whole = list(SpotLoader(make_spots(), 4, 1, 7, lambda: 0, 0, 1))
    for step, one in enumerate(whole):
        here = [share for part in shares for share in part[step * n_parts : (step + 1) * n_parts]]
        found = {int(i): f for s in here for i, f in zip(s.batch.spot_ids, s.batch.features, strict=True)}
        expected = {int(i): f for i, f in zip(one.batch.spot_ids, one.batch.features, strict=True)}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i], expected[i]) for i in found)  # the same view of each
        # the mean over parts and processes is that over the batch's spots
        mean = sum(s.weight * s.batch.spot_ids.double().mean() for s in here) / (n_parts * n_ranks)
        assert mean == pytest.approx(float(one.batch.spot_ids.double().mean()))


def test_sections_are_shared_in_turns():
    shares = [
        list(SectionLoader(make_spots(), make_spots().section.unique(), 7, lambda: 0, rank, 2)) for rank in (0, 1)
    ]
    assert [len(part) for part in shares] == [2, 2]
    seen = [int(share.batch.section[0]) for part in shares for share in part]
    assert set(seen) == {0, 1, 2}
    assert all(len(share.batch.section.unique()) == 1 for part in shares for share in part)


def test_accumulated_batches_make_a_larger_step():
    class Sized(torch.nn.Module):
        unit, spot_bytes = "spot", 0

    module = _Module(Sized(), make_spots(), None, TrainConfig(batch_size=8, accumulate=3), print)
    assert (module.n_batches, module.n_parts) == (3, 3)
    with pytest.raises(InputError, match="use fewer"):
        _Module(Sized(), make_spots(), None, TrainConfig(batch_size=8), print, n_ranks=60)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("m2ost", {"spots_per_step": 40}, 5),
        ("m2ost", {}, 1),
        ("triplex", {"spots_per_step": 64}, 3),
        ("hist2st", {}, 1),
    ],
)
def test_an_epoch_looks_at_each_spot_about_once(name, settings, expected):
    whole = array_spots(14, 14, 4)
    model = model_class(name).create(24, whole, "small", settings)
    assert model.section_steps(len(whole)) == expected
    config = TrainConfig(validation_share=0.0)
    module = _Module(model, whole, None, config, print)
    assert module.n_batches == expected


def test_sections_come_as_often_as_they_have_steps():
    both = Spots.join([array_spots(4, 4, 2), array_spots(8, 8, 2, seed=1)])
    turns = section_turns(both.section, lambda n: n // 16)
    assert turns.tolist() == [0, 1, 1, 1, 1]
    given = [int(share.batch.section[0]) for share in SectionLoader(both, turns, 7, lambda: 0, 0, 1)]
    assert sorted(given) == turns.tolist()
    shared = [list(SectionLoader(both, turns, 7, lambda: 0, rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in shared] == [3, 3]
