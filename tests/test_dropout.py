"""Dropout: the right share, unbiased, and PyTorch's where it is not ours."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trackformer_sb.nnet.dropout import Dropout


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_is_met_and_the_mean_kept(p, dtype):
    dropped = Dropout(p)(torch.ones(3, 400, 1001, dtype=dtype))
    assert dropped.shape == (3, 400, 1001) and dropped.dtype == dtype
    share = (dropped == 0).double().mean().item()
    # five standard deviations, and what the 16 bits round
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(share - p) < 5 * deviation + 2**-17
    assert len(dropped.unique()) == 2
    mean = dropped.double().mean().item()
    assert mean == pytest.approx(1, abs=6 * deviation / (1 - p) + 0.004)


def test_elements_are_dropped_independently_of_their_neighbours():
    keep = (Dropout(0.3)(torch.ones(200_000)) != 0).double() - 0.7
    for lag in (1, 2, 3, 4, 64):
        covariance = (keep[lag:] * keep[:-lag]).mean().item()
        assert abs(covariance) < 5 * 0.21 / 200_000**0.5


def test_the_gradient_goes_where_the_value_went():
    x = torch.randn(7, 33, requires_grad=True)
    dropped = Dropout(0.4)(x)
    dropped.sum().backward()
    torch.testing.assert_close(x * x.grad, dropped)
    assert set(x.grad.unique().tolist()) == {0, x.grad.max().item()}


def test_a_seed_gives_the_same_and_a_call_another():
    dropout, x = Dropout(0.5), torch.ones(100)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first)


def test_a_checkpoint_drops_the_same_again():
    layer = nn.Sequential(nn.Linear(8, 64), Dropout(0.5), nn.Linear(64, 8))
    x, grads = torch.randn(5, 8), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append(layer[0].weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-9, 1 - 1e-9])
def test_extremes_are_those_of_torch(p):
    x = torch.randn(50)
    torch.testing.assert_close(Dropout(p)(x), nn.Dropout(round(p))(x))


def test_evaluation_changes_nothing():
    x = torch.randn(50)
    assert torch.equal(Dropout(0.5).eval()(x), x)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (4,), (2, 0, 5)])
def test_any_shape_will_do(shape):
    assert Dropout(0.5)(torch.ones(shape)).shape == shape


def test_in_place_is_in_place():
    x = torch.ones(100)
    assert Dropout(0.5, inplace=True)(x) is x
    assert (x == 0).any()


def test_another_default_device_does_not_matter():
    x = torch.ones(100)
    with torch.device("meta"):
        assert Dropout(0.5)(x).device.type == "cpu"


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)
