"""MixIT against brute force, against Asteroid, and its invariances."""

import itertools

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.objectives.mixit import (
    OBJECTIVES,
    get_mixit,
    mixit_assignment,
    mixit_loss,
)

SEEDS = st.integers(0, 2**31)


def sources_and_mixtures(num_sources=4, num_mixtures=2, time=50, batch=2):
    """Estimates that explain the mixtures well, badly and with an offset."""
    truth = torch.randn(batch, num_sources, time)
    truth *= torch.logspace(0, -1, num_sources).unsqueeze(1)
    owner = torch.randint(num_mixtures, (batch, num_sources))
    owner[:, :num_mixtures] = torch.arange(num_mixtures)[:num_sources]
    mixtures = torch.stack(
        [
            (truth * (owner == m).unsqueeze(-1)).sum(1)
            for m in range(num_mixtures)
        ],
        dim=1,
    )
    level = torch.tensor([0.1, 1.0] * batch)[:batch, None, None]
    est_source = truth + level * torch.randn_like(truth) + 0.1
    return est_source, mixtures


def value_and_gradient(loss, est_source):
    """The loss and its gradient, items weighed differently."""
    est_source = est_source.clone().requires_grad_()
    value = loss(est_source)
    weight = torch.arange(1, len(value) + 1).to(value)
    (value * weight).sum().backward()
    return value.detach().cpu(), est_source.grad.cpu()


# -- against brute force


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "num_mixtures, num_sources",
    [(1, 3), (2, 1), (2, 2), (2, 4), (2, 8), (3, 2), (3, 5), (4, 3)],
)
def test_equals_brute_force(objective, num_mixtures, num_sources, device):
    est_source, mixtures = sources_and_mixtures(num_sources, num_mixtures)
    expected, slope = value_and_gradient(
        lambda x: references.mixit(x, mixtures, objective)[0], est_source
    )
    value, gradient = value_and_gradient(
        lambda x: mixit_loss(x, mixtures.to(device), objective)[0],
        est_source.to(device),
    )
    torch.testing.assert_close(value, expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "objective, assign_by", list(itertools.product(OBJECTIVES, repeat=2))
)
def test_searches_by_one_objective_and_minimises_another(objective, assign_by):
    # where objectives choose differently
    est_source, mixtures = sources_and_mixtures(5, batch=20)
    chosen = [mixit_assignment(est_source, mixtures, x) for x in OBJECTIVES]
    assert not torch.equal(chosen[1], chosen[2])
    expected, slope = value_and_gradient(
        lambda x: references.mixit(x, mixtures, objective, assign_by=assign_by)[
            0
        ],
        est_source,
    )
    value, gradient = value_and_gradient(
        lambda x: mixit_loss(x, mixtures, objective, assign_by=assign_by)[0],
        est_source,
    )
    torch.testing.assert_close(value, expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("snr_max", [10.0, 30.0])
def test_threshold_bounds_the_snr(snr_max):
    est_source, mixtures = sources_and_mixtures()
    value, _ = mixit_loss(est_source, mixtures, snr_max=snr_max)
    expected, _ = references.mixit(est_source, mixtures, "snr", snr_max)
    torch.testing.assert_close(value, expected.float(), atol=1e-4, rtol=1e-4)
    perfect, _ = mixit_loss(mixtures, mixtures, snr_max=snr_max)
    torch.testing.assert_close(perfect, torch.full((2,), -snr_max))


# -- against Asteroid


def _asteroid_snr(est_targets, targets):
    error = (targets - est_targets).square().sum(-1)
    energy = targets.square().sum(-1)
    loss = 10 * ((error + 1e-3 * energy) / energy).log10()
    return loss.mean(-1)


@pytest.mark.parametrize("objective", ["snr", "si_snr"])
@pytest.mark.filterwarnings("ignore")
def test_equals_asteroid(objective):
    losses = pytest.importorskip("asteroid.losses")
    loss_func = {"snr": _asteroid_snr, "si_snr": losses.multisrc_neg_sisdr}
    wrapper = losses.MixITLossWrapper(loss_func[objective], reduction="none")
    est_source, mixtures = sources_and_mixtures(6, time=400, batch=4)
    expected, slope = value_and_gradient(
        lambda x: wrapper(x, mixtures).squeeze(1), est_source
    )
    value, gradient = value_and_gradient(
        lambda x: mixit_loss(x, mixtures, objective)[0], est_source
    )
    torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-3)


# -- invariances


@given(
    num_sources=st.integers(1, 6),
    num_mixtures=st.integers(1, 3),
    objective=st.sampled_from(OBJECTIVES),
    seed=SEEDS,
)
def test_order_does_not_matter(num_sources, num_mixtures, objective, seed):
    torch.manual_seed(seed)
    est_source, mixtures = sources_and_mixtures(num_sources, num_mixtures)
    order, other = torch.randperm(num_sources), torch.randperm(num_mixtures)
    value, assignment = mixit_loss(est_source, mixtures, objective)
    permuted, reordered = mixit_loss(
        est_source[:, order], mixtures[:, other], objective
    )
    torch.testing.assert_close(permuted, value, atol=1e-4, rtol=1e-4)
    assert torch.equal(reordered, assignment[:, other][:, :, order])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batch_neighbours_and_silent_sources_do_not_matter(objective):
    est_source, mixtures = sources_and_mixtures(4, batch=3)
    est_source[1], mixtures[1] = 1e3 * est_source[1], 1e3 * mixtures[1]
    est_source[2], mixtures[2] = 0.0, 0.0
    padded = torch.nn.functional.pad(est_source, (0, 0, 0, 1))
    value, assignment = mixit_loss(padded, mixtures, objective)
    for i in range(3):
        alone, same = mixit_loss(
            est_source[i : i + 1], mixtures[i : i + 1], objective
        )
        torch.testing.assert_close(value[i : i + 1], alone)
        assert torch.equal(assignment[i : i + 1, :, :4], same)


# -- silence


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("silent_mixtures", [0, 1, 2])
@pytest.mark.parametrize("silent_sources", [0, 4])
def test_silence_gives_finite_losses_and_gradients(
    objective, silent_mixtures, silent_sources
):
    est_source, mixtures = sources_and_mixtures()
    mixtures[:, :silent_mixtures] = 0.0
    est_source[:, :silent_sources] = 0.0
    value, gradient = value_and_gradient(
        lambda x: mixit_loss(x, mixtures, objective)[0], est_source
    )
    assert value.isfinite().all() and gradient.isfinite().all()
    if silent_mixtures < 2:
        expected, _ = references.mixit(est_source, mixtures, objective)
        torch.testing.assert_close(
            value, expected.float(), atol=1e-3, rtol=1e-4
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_silent_mixture_is_given_no_source(objective):
    sources = torch.randn(1, 4, 100)
    mixtures = torch.stack([sources.sum(1), torch.zeros(1, 100)], 1)
    _, assignment = mixit_loss(sources, mixtures, objective)
    assert torch.equal(assignment[0], torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_si_snr_leaves_no_mixture_without_a_source():
    """At the start of training every source is the sum of both mixtures.

    It fits the quieter mixture with less than 0 dB, and yet has to be tried:
    an empty sum would get no gradient, and all sources go to the louder one.
    """
    mixtures = torch.randn(8, 2, 1000)
    mixtures[:, 1] *= 0.3
    sources = mixtures.sum(1, keepdim=True) / 8 + 0.01 * torch.randn(8, 8, 1000)
    _, assignment = mixit_loss(sources, mixtures, "si_snr")
    assert (assignment.sum(2) > 0).all()


# -- precision


def test_winner_is_accurate_at_60_db():
    """Energies of errors that small are lost in float32 inner products."""
    sources = torch.randn(2, 6, 20000)
    mixtures = torch.stack([sources[:, :4].sum(1), sources[:, 4:].sum(1)], 1)
    est_source = sources + 1e-3 * torch.randn_like(sources)
    for objective in OBJECTIVES:
        value, assignment = mixit_loss(
            est_source, mixtures, objective, snr_max=90.0
        )
        exact, same = mixit_loss(
            est_source.double(), mixtures.double(), objective, snr_max=90.0
        )
        assert torch.equal(assignment, same.float())
        torch.testing.assert_close(value.double(), exact, atol=1e-2, rtol=1e-3)
    assert exact.max() < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_sources_are_compared_in_single(objective, device):
    est_source, mixtures = sources_and_mixtures()
    half = est_source.to(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value, assignment = mixit_loss(half, mixtures.to(device), objective)
    expected, same = mixit_loss(half.float(), mixtures.to(device), objective)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(assignment, same)


# -- beyond exhaustive reach


@pytest.mark.parametrize("num_mixtures", [2, 3])
def test_least_squares_search_recovers_an_assignment(num_mixtures):
    sources = torch.randn(3, 20, 500) * torch.logspace(0, -2, 20)[:, None]
    # equal and silent sources make the equations singular
    sources[1, 3] = sources[1, 2]
    sources[2, 5] = 0.0
    owner = torch.randint(num_mixtures, (3, 20))
    owner[1, 3] = owner[1, 2]
    truth = torch.nn.functional.one_hot(owner, num_mixtures).mT.float()
    value, assignment = mixit_loss(sources, truth @ sources)
    torch.testing.assert_close(
        value, torch.full((3,), -30.0), atol=1e-2, rtol=0
    )
    assert torch.equal(assignment[0], truth[0])
    assert torch.equal(assignment.sum(1), torch.ones(3, 20))


# -- interfaces


def test_recipe_signature_has_time_before_sources():
    est_source, mixtures = sources_and_mixtures(5)
    for more in ((), *((objective, 20.0) for objective in OBJECTIVES)):
        expected, _ = mixit_loss(est_source, mixtures, *more)
        value = get_mixit(mixtures.mT, est_source.mT, *more)
        assert value.shape == (2,) and torch.equal(value, expected)


@pytest.mark.parametrize("mixtures", [(2, 2, 49), (1, 2, 50), (2, 50)])
def test_shapes_that_do_not_fit_are_named(mixtures):
    with pytest.raises(ValueError, match=r"\[batch, sources, time\].*got \["):
        mixit_loss(torch.zeros(2, 4, 50), torch.zeros(mixtures))


@pytest.mark.parametrize("argument", ["objective", "assign_by"])
def test_unknown_objectives_are_named(argument):
    with pytest.raises(
        ValueError, match="one of snr, si_snr, mse, got 'sisdr'"
    ):
        mixit_loss(*sources_and_mixtures(), **{argument: "sisdr"})
