"""Learning rates step by step, and parameters that are trained apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.training.optimization import (
    clip_all_groups,
    cosine_schedule,
    frozen_epochs,
    moving_average,
    separate_group,
    separate_layers,
)


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor([float(x)])) for x in values]


def adamw(lr=1e-3, count=4):
    return torch.optim.AdamW(parameters(*range(1, count + 1)), lr=lr)


def step(optimizer, gradient=1.0):
    """An optimizer step with the same gradient everywhere."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def rates(optimizer, schedule, count):
    """The learning rates of each group over a number of steps."""
    found = []
    for _ in range(count):
        found.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)
        schedule.step()
    return [list(group) for group in zip(*found)]


# --- the schedule ------------------------------------------------------------


@given(
    lr=st.floats(1e-6, 10.0),
    final=st.floats(0.0, 1.0),
    num_steps=st.integers(1, 15),
)
def test_schedule_is_the_cosine_of_torch_and_stays_at_its_end(
    lr, final, num_steps
):
    ours, theirs = adamw(lr), adamw(lr)
    schedule = cosine_schedule(ours, num_steps, lr * final)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        theirs, T_max=num_steps, eta_min=lr * final
    )
    (found,) = rates(ours, schedule, num_steps + 5)
    # torch's own rises again after its end
    (expected,) = rates(theirs, reference, num_steps + 1)
    assert found[: num_steps + 1] == pytest.approx(
        expected, rel=1e-6, abs=1e-9 * lr
    )
    assert found[num_steps:] == pytest.approx(
        [lr * final] * 5, rel=1e-6, abs=1e-9 * lr
    )


def test_warmup_rises_in_equal_steps_into_the_cosine():
    plain, warm = adamw(), adamw()
    (without,) = rates(plain, cosine_schedule(plain, 20, 1e-5), 25)
    schedule = cosine_schedule(warm, 20, 1e-5, warmup_steps=4)
    (found,) = rates(warm, schedule, 25)
    shares = [a / b for a, b in zip(found, without)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == without[4:]
    # the first step already learns
    assert 0 < found[0] < found[1] < found[2] < found[3]


def test_schedule_of_no_steps_is_at_its_end_after_one():
    optimizer = adamw()
    (found,) = rates(optimizer, cosine_schedule(optimizer, 0, 1e-5), 3)
    assert found == pytest.approx([1e-3, 1e-5, 1e-5])


@pytest.mark.parametrize("lr", [0.0, -1e-3])
def test_schedule_needs_a_learning_rate(lr):
    optimizer = adamw()
    optimizer.defaults["lr"] = lr
    with pytest.raises(ValueError, match=f"expected lr above 0 .* got {lr}"):
        cosine_schedule(optimizer, 10, 1e-5)


# --- a group of its own ------------------------------------------------------


@given(
    lr_scale=st.floats(0.0, 2.0),
    freeze_steps=st.integers(0, 12),
    warmup_steps=st.integers(0, 3),
)
def test_separate_group_follows_the_others_after_its_freeze(
    lr_scale, freeze_steps, warmup_steps
):
    optimizer = adamw()
    chosen = optimizer.param_groups[0]["params"][:2]
    separate_group(optimizer, chosen, lr_scale, freeze_steps)
    schedule = cosine_schedule(optimizer, 10, 1e-5, warmup_steps)
    others, apart = rates(optimizer, schedule, 14)
    plain = adamw()
    (expected,) = rates(
        plain, cosine_schedule(plain, 10, 1e-5, warmup_steps), 14
    )
    assert others == expected
    frozen = min(freeze_steps, 14)
    assert apart[:frozen] == [0.0] * frozen
    assert apart[frozen:] == pytest.approx(
        [lr_scale * rate for rate in expected[frozen:]]
    )


@pytest.mark.parametrize(
    ("share", "frozen"), [(0.3, 3), (0.25, 3), (0.01, 1), (0.99, 10)]
)
def test_a_freeze_below_one_is_a_share_of_all_steps(share, frozen):
    optimizer = adamw()
    chosen = optimizer.param_groups[0]["params"][:2]
    separate_group(optimizer, chosen, freeze_steps=share)
    schedule = cosine_schedule(optimizer, 10, 1e-5)
    others, apart = rates(optimizer, schedule, 12)
    assert all(others)
    assert apart == [0.0] * frozen + others[frozen:]


def test_a_longer_training_does_not_freeze_again():
    def begin(num_steps):
        optimizer = adamw()
        chosen = optimizer.param_groups[0]["params"][:2]
        separate_group(optimizer, chosen, freeze_steps=0.3)
        return optimizer, cosine_schedule(optimizer, num_steps, 1e-5)

    optimizer, schedule = begin(10)
    assert rates(optimizer, schedule, 4)[1][-1] > 0
    saved = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = begin(1000)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[1]["lr"] > 0


def test_an_optimizer_saved_without_a_freeze_goes_on():
    saved = adamw().state_dict()
    assert "freeze_steps" not in saved["param_groups"][0]
    optimizer = adamw()
    schedule = cosine_schedule(optimizer, 10, 1e-5)
    optimizer.load_state_dict(saved)
    assert all(rates(optimizer, schedule, 3)[0])


@given(chosen=st.sets(st.integers(0, 5)))
def test_every_parameter_stays_in_one_group_and_in_order(chosen):
    optimizer = adamw(count=6)
    before = list(optimizer.param_groups[0]["params"])
    # in any order, and from a generator
    separate_group(optimizer, (before[i] for i in sorted(chosen)[::-1]))
    groups = [group["params"] for group in optimizer.param_groups]
    # none for nothing
    first, second = groups if chosen else (*groups, [])
    assert [id(p) for p in second] == [id(before[i]) for i in sorted(chosen)]
    rest = [i for i in range(6) if i not in chosen]
    assert [id(p) for p in first] == [id(before[i]) for i in rest]


def test_separate_group_of_several_groups():
    """SpeechBrain's ``remove_vector_weight_decay`` makes two."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
    vectors, matrices = parameters[:2], parameters[2:]
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}],
        weight_decay=0.5,
        lr=0.1,
    )
    chosen = [vectors[0], matrices[0]]
    separate_group(optimizer, chosen, freeze_steps=2)
    decays = [x["weight_decay"] for x in optimizer.param_groups]
    assert decays == [0.0, 0.5, 0.0, 0.5]
    schedule = cosine_schedule(optimizer, lr_final=0.01, num_steps=4)
    clip_all_groups(optimizer, 1e-3)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.full((1,), 7.0)
        before = [parameter.item() for parameter in parameters]
        optimizer.step()
        schedule.step()
        moved = [p.item() != x for p, x in zip(parameters, before)]
        assert moved == [step >= 2, True, step >= 2, True]
        # clipped together, whatever group they are in
        norm = torch.stack([p.grad for p, m in zip(parameters, moved) if m])
        assert norm.norm() == pytest.approx(1e-3, rel=1e-3)


def test_separate_group_keeps_the_options_of_the_optimizer():
    optimizer = torch.optim.AdamW(
        parameters(1, 2, 3), lr=0.5, weight_decay=0.125, betas=(0.5, 0.75)
    )
    separate_group(optimizer, optimizer.param_groups[0]["params"][:1])
    first, second = optimizer.param_groups
    for key in first.keys() - {"params"}:
        assert first[key] == second[key], key
    assert (second["lr_scale"], second["freeze_steps"]) == (1.0, 0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"lr_scale": 0.0}, {"freeze_steps": 3}])
def test_frozen_parameters_keep_their_value(options, fused):
    # neither AdamW's first steps nor its weight decay move them
    optimizer = torch.optim.AdamW(
        parameters(1, 2, 3), lr=0.1, weight_decay=0.5, fused=fused
    )
    apart, _, other = optimizer.param_groups[0]["params"]
    separate_group(optimizer, [apart], **options)
    schedule = cosine_schedule(optimizer, 10, 0.01)
    seen = []
    for _ in range(5):
        step(optimizer)
        schedule.step()
        seen.append((apart.item(), other.item()))
    frozen = options.get("freeze_steps", 5)
    assert [values[0] for values in seen[:frozen]] == [1.0] * frozen
    assert all(values[0] < 1.0 for values in seen[frozen:])
    assert len({values[1] for values in seen}) == 5


@pytest.mark.parametrize(
    ("lr_scale", "freeze_steps"),
    [(-0.1, 0), (1.0, -1), (float("nan"), 0), (1.0, "many"), (None, 0)],
)
def test_negative_numbers_are_refused(lr_scale, freeze_steps):
    optimizer = adamw()
    message = (
        "expected lr_scale and freeze_steps from 0, "
        f"got {lr_scale} and {freeze_steps}"
    )
    with pytest.raises(ValueError, match=message):
        separate_group(
            optimizer,
            optimizer.param_groups[0]["params"][:1],
            lr_scale,
            freeze_steps,
        )
    assert len(optimizer.param_groups) == 1


# --- layers of a pre-trained encoder -----------------------------------------


@given(
    lr_scale=st.floats(0.0, 2.0),
    freeze_steps=st.integers(0, 4),
    layer_decay=st.floats(0.01, 1.0),
)
def test_each_layer_learns_slower_than_the_next(
    lr_scale, freeze_steps, layer_decay
):
    optimizer = adamw(count=6)
    embedding, first, *second, head, other = optimizer.param_groups[0]["params"]
    layers = [[embedding], [first], second]
    separate_layers(optimizer, layers, lr_scale, freeze_steps, layer_decay)
    schedule = cosine_schedule(optimizer, 10, 1e-5)
    others, *found = rates(optimizer, schedule, 8)
    # who learns at what share of the head's rate
    shares = {
        id(parameter): [a / b for a, b in zip(lr, others)]
        for group, lr in zip(optimizer.param_groups[1:], found)
        for parameter in group["params"]
    }
    assert shares.keys() == {id(p) for layer in layers for p in layer}
    groups = optimizer.param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(head), id(other)]
    assert len(groups) == (2 if layer_decay == 1 else 4)
    for below, layer in enumerate([second, [first], [embedding]], 1):
        for parameter in layer:
            assert shares[id(parameter)] == pytest.approx(
                [0.0] * freeze_steps
                + [lr_scale * layer_decay**below] * (8 - freeze_steps)
            )


@pytest.mark.parametrize("layer_decay", [0, -0.5, 1.1, float("nan"), "x"])
def test_layer_decay_is_a_share(layer_decay):
    optimizer = adamw()
    message = f"expected layer_decay above 0 and up to 1, got {layer_decay}"
    layers = [optimizer.param_groups[0]["params"][:1]]
    with pytest.raises(ValueError, match=message):
        separate_layers(optimizer, layers, layer_decay=layer_decay)
    assert len(optimizer.param_groups) == 1


# --- clipping ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_norm", "expected"), [(1.0, 1.0), (5.0, 5.0), (50.0, 10.0)]
)
def test_norm_over_all_groups_is_clipped(max_norm, expected):
    # 25 gradients of 2: a norm of 10
    weights = parameters(*[0] * 25)
    optimizer = torch.optim.SGD(weights, lr=1.0)
    separate_group(optimizer, weights[:9])
    clip_all_groups(optimizer, max_norm)
    step(optimizer, 2.0)
    moved = torch.cat(weights).detach()
    assert moved.norm().item() == pytest.approx(expected, rel=1e-5)
    # all alike: the direction is that of the gradient
    torch.testing.assert_close(moved, moved[0].expand(25))


def test_what_is_frozen_does_not_count_for_the_norm():
    frozen, weight = parameters(0, 0)
    optimizer = torch.optim.SGD([frozen, weight], lr=1.0)
    separate_group(optimizer, [frozen], freeze_steps=2)
    schedule = cosine_schedule(optimizer, 100, 1.0)
    clip_all_groups(optimizer, 1.0)
    seen = []
    for _ in range(3):
        # large, as of an encoder below a new head
        frozen.grad, weight.grad = torch.tensor([3.0]), torch.tensor([4.0])
        optimizer.step()
        schedule.step()
        seen.append((frozen.item(), weight.item()))
    expected = [(0.0, -1.0), (0.0, -2.0), (-0.6, -2.8)]
    for found, values in zip(seen, expected):
        assert found == pytest.approx(values, rel=1e-5)


def test_clipping_without_a_limit_changes_nothing():
    weights = parameters(0, 0)
    optimizer = torch.optim.SGD(weights, lr=1.0)
    clip_all_groups(optimizer, float("inf"))
    step(optimizer, 1e6)
    assert [weight.item() for weight in weights] == [-1e6, -1e6]


def test_clipped_training_is_the_one_with_a_single_group():
    """Separate groups with the same rates learn what one group learns."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(8, 4), 100 * torch.randn(8, 2)
    results = []
    for separate in (False, True):
        torch.manual_seed(2)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        if separate:
            separate_group(optimizer, net[0].parameters())
            clip_all_groups(optimizer, 0.3)
        schedule = cosine_schedule(optimizer, 6, 0.1)
        for _ in range(6):
            optimizer.zero_grad()
            (net(inputs) - targets).square().mean().backward()
            if not separate:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            schedule.step()
        results.append(net.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, msg=key)


# --- going on ----------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_resumed_schedule_gives_the_same_rates(stop_at):
    def fresh():
        optimizer = adamw()
        separate_group(
            optimizer, optimizer.param_groups[0]["params"][:2], 0.5, 3
        )
        return optimizer, cosine_schedule(optimizer, 8, 1e-5, 2)

    whole = rates(*fresh(), 12)
    first = fresh()
    rates(*first, stop_at)
    optimizer, schedule = fresh()
    optimizer.load_state_dict(first[0].state_dict())
    schedule.load_state_dict(first[1].state_dict())
    rest = rates(optimizer, schedule, 12 - stop_at)
    assert rest == [group[stop_at:] for group in whole]


# --- epochs that are frozen --------------------------------------------------


@pytest.mark.parametrize("freeze", [0.1, 500])
def test_frozen_epochs_of_a_training_that_a_limit_ends(freeze):
    optimizer = adamw()
    separate_group(
        optimizer, optimizer.param_groups[0]["params"][:2], 1.0, freeze
    )
    # half an epoch, however many epochs the yaml has
    assert frozen_epochs(optimizer, 5000, epoch_steps=1000) == 1


def test_averages_forget_where_they_began():
    model = torch.nn.Linear(1, 1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=moving_average(0.9)
    )
    for step in range(300):
        torch.nn.init.constant_(model.weight, 1000.0 if step < 3 else 1.0)
        average.update_parameters(model)
        if step == 30:
            assert average.module.weight.item() < 30
    assert average.module.weight.item() == pytest.approx(1, abs=1e-3)
    torch.nn.init.constant_(model.weight, 2.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1.1, abs=1e-3)
