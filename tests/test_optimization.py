"""Learning rates step by step, and parameters that are trained apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.training.optimization import (
    clip_all_groups,
    cosine_schedule,
    moving_average,
    separate_layers,
)


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor([float(x)])) for x in values]


def adamw(lr=1e-3, count=4):
    return torch.optim.AdamW(parameters(*range(1, count + 1)), lr=lr)


def first_two(optimizer, **options):
    """Separates two parameters, as one layer."""
    layer = optimizer.param_groups[0]["params"][:2]
    separate_layers(optimizer, [layer], **options)


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
    # the first step already learns
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == without[4:]


def test_schedule_needs_a_learning_rate():
    with pytest.raises(ValueError, match=r"expected lr above 0 .* got 0\.0"):
        cosine_schedule(adamw(lr=0.0), 10, 1e-5)


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


def test_a_longer_training_does_not_freeze_again():
    def begin(num_steps):
        optimizer = adamw()
        first_two(optimizer, freeze_steps=0.3)
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


def test_groups_that_there_are_keep_their_options():
    """SpeechBrain's ``remove_vector_weight_decay`` makes two."""
    vectors, matrices = parameters(1, 1), parameters(1, 1)
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}],
        weight_decay=0.5,
        lr=0.1,
    )
    layer = [vectors[0], matrices[0]]
    separate_layers(optimizer, [layer], freeze_steps=2)
    decays = [x["weight_decay"] for x in optimizer.param_groups]
    assert decays == [0.0, 0.5, 0.0, 0.5]
    schedule = cosine_schedule(optimizer, lr_final=0.01, num_steps=4)
    clip_all_groups(optimizer, 1e-3)
    for number in range(4):
        both = vectors + matrices
        before = [parameter.item() for parameter in both]
        step(optimizer, 7.0)
        schedule.step()
        # frozen, neither AdamW's first steps nor its decay move them
        moved = [p.item() != x for p, x in zip(both, before)]
        assert moved == [number >= 2, True, number >= 2, True]
        # clipped together, whatever group they are in
        norm = torch.stack([p.grad for p, m in zip(both, moved) if m])
        assert norm.norm() == pytest.approx(1e-3, rel=1e-3)


# --- going on ----------------------------------------------------------------


def test_averages_forget_where_they_began():
    model = torch.nn.Linear(1, 1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=moving_average(0.9)
    )
    for number in range(300):
        torch.nn.init.constant_(model.weight, 1000.0 if number < 3 else 1.0)
        average.update_parameters(model)
        if number == 30:
            assert average.module.weight.item() < 30
    assert average.module.weight.item() == pytest.approx(1, abs=1e-3)
    torch.nn.init.constant_(model.weight, 2.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1.1, abs=1e-3)
