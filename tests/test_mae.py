"""Audio-MAE: what is hidden, what may be seen of it, what is compared."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.nnet.features import SpectrogramEncoder
from trackformer_sb.nnet.mae import MASK_MODES, AudioMAE, draw_hidden_frames

CHANNELS = 10
FRAMES = 20


# "mix" needs other music, see the section on it
HIDING_MODES = tuple(mode for mode in MASK_MODES if mode != "mix")


def small_mae(spec_norm="zscore", checkpointing=False, **options):
    """10 channels, one layer on either side, no dropout."""
    features = SpectrogramEncoder(
        CHANNELS,
        d_model=16,
        nhead=2,
        num_layers=1,
        d_ffn=16,
        n_features=16,
        dropout=0.0,
        spec_norm=spec_norm,
        checkpointing=checkpointing,
    )
    options = {"d_decoder": 8, "decoder_nhead": 2, **options}
    return AudioMAE(features, **options)


def music(batch=3, frames=FRAMES):
    """Complex noise with a spectral slope, [batch, channels, frames]."""
    slope = torch.logspace(1, -2, CHANNELS)[:, None]
    return slope * torch.randn(batch, CHANNELS, frames, dtype=torch.complex64)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


# --- what is hidden ----------------------------------------------------------


MASKS = {
    "frames": st.integers(2, 60),
    "mask_ratio": st.floats(0.001, 0.999),
    "mask_span": st.integers(1, 12),
    "seed": st.integers(0, 1000),
}


@given(**MASKS)
def test_share_is_exact_in_each_item(frames, mask_ratio, mask_span, seed):
    frames = max(frames, mask_span)
    hidden = draw_hidden_frames(4, frames, mask_ratio, mask_span, seeded(seed))
    assert hidden.shape == (4, frames) and hidden.dtype == torch.bool
    count = min(max(round(mask_ratio * frames), 1), frames - 1)
    assert hidden.sum(1).tolist() == [count] * 4


def cut_spans(hidden, mask_span):
    """Least number of spans hidden in part, over all places of the grid.

    Spans lie end to end from some place before the first frame; where the
    segment ends, what is left of a span is a whole one.
    """
    counts = []
    for start in range(mask_span):
        place = torch.arange(start, start + len(hidden)) // mask_span
        spans = [hidden[place == span] for span in place.unique()]
        partial = [s for s in spans if s.any() and not s.all()]
        # a cut span has no holes: its first frames are hidden
        holes = [s for s in partial if (s.diff().sum() != 1) or not s[0]]
        counts.append(len(partial) + 100 * len(holes))
    return min(counts)


def test_cut_spans_are_counted():
    def count(text):
        return cut_spans(torch.tensor([x == "x" for x in text]), 3)

    # whole spans; cut by the ends of the segment; one cut short
    assert count("..xxx...xxxxxx") == 0
    assert count("x......xxx...x") == 0
    assert count("..xxx...xx....") == 1
    # two cut short, off the grid, with a hole
    assert count("..xxx...xx.x..") > 1
    assert count("..xxx.xxx......") > 1
    assert count("...x.x........") > 1


@given(**MASKS)
def test_whole_spans_are_hidden_but_for_one(
    frames, mask_ratio, mask_span, seed
):
    frames = max(frames, mask_span)
    hidden = draw_hidden_frames(4, frames, mask_ratio, mask_span, seeded(seed))
    assert all(cut_spans(item, mask_span) <= 1 for item in hidden)


@pytest.mark.parametrize("mask_span", [1, 3, 7])
def test_every_frame_is_hidden_as_often(mask_span):
    hidden = draw_hidden_frames(4000, FRAMES, 0.3, mask_span, seeded())
    often = hidden.float().mean(0)
    assert often.min() > 0.2 and often.max() < 0.4


def test_items_hide_different_frames():
    hidden = draw_hidden_frames(50, 40, 0.3, 4, seeded())
    assert len({tuple(item.tolist()) for item in hidden}) > 40


def test_masks_are_reproducible():
    drawn = [draw_hidden_frames(4, 40, 0.3, 2, seeded(i)) for i in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("frames", "mask_span", "least"), [(1, 1, 2), (7, 8, 8)]
)
def test_short_segments_are_refused(frames, mask_span, least):
    message = rf"mask_span: expected .*at least {least} frames, got {frames}:"
    with pytest.raises(ValueError, match=message):
        draw_hidden_frames(2, frames, 0.3, mask_span)
    with pytest.raises(ValueError, match=message):
        small_mae(mask_span=mask_span)(music(2, frames))


@pytest.mark.parametrize("mask_mode", ["zero", "noise"])
@pytest.mark.parametrize("mask_bands", [2, 3, CHANNELS])
def test_bands_are_masked_each_by_itself(mask_mode, mask_bands):
    mae = small_mae(mask_mode=mask_mode, mask_bands=mask_bands, mask_span=2)
    hidden = mae(music()).hidden
    assert hidden.shape == (3, FRAMES, CHANNELS)
    # bands of neighbouring channels, of equal width within one channel
    places = [
        [c for c in range(CHANNELS) if c * mask_bands // CHANNELS == band]
        for band in range(mask_bands)
    ]
    widths = [len(channels) for channels in places]
    assert max(widths) - min(widths) <= 1 and sum(widths) == CHANNELS
    first = [hidden[:, :, channels[0]] for channels in places]
    for channels, frames in zip(places, first):
        assert torch.equal(
            hidden[:, :, channels],
            frames.unsqueeze(-1).expand(-1, -1, len(channels)),
        )
        assert frames.sum(1).tolist() == [6, 6, 6]
        assert all(cut_spans(item, 2) <= 1 for item in frames)
    assert any(not torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_whole_frames_are_hidden_with_one_band(mask_mode):
    hidden = small_mae(mask_mode=mask_mode, mask_ratio=0.5)(music()).hidden
    assert torch.equal(hidden.any(-1), hidden.all(-1))
    assert hidden.all(-1).sum(1).tolist() == [10, 10, 10]


# --- what is compared --------------------------------------------------------


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
@pytest.mark.parametrize("normalise_target", [False, True])
def test_loss_is_the_error_of_what_is_hidden(mask_mode, normalise_target):
    mae = small_mae(mask_mode=mask_mode, normalise_target=normalise_target)
    loss, prediction, target, hidden = mae(music())
    assert loss.shape == (3,)
    assert prediction.shape == target.shape == hidden.shape
    assert prediction.shape == (3, FRAMES, CHANNELS)
    for i in range(3):
        errors = [
            (prediction[i, t, c] - target[i, t, c]).item() ** 2
            for t in range(FRAMES)
            for c in range(CHANNELS)
            if hidden[i, t, c]
        ]
        assert len(errors) == 6 * CHANNELS
        assert loss[i].item() == pytest.approx(sum(errors) / len(errors))


def test_loss_of_bands_is_the_error_of_what_is_hidden():
    mae = small_mae(mask_bands=3)
    loss, prediction, target, hidden = mae(music())
    for i in range(3):
        error = (prediction[i] - target[i])[hidden[i]].square().mean()
        torch.testing.assert_close(loss[i], error)


@pytest.mark.parametrize(
    ("mask_mode", "mask_bands"),
    [("zero", 1), ("zero", 3), ("noise", 3), ("drop", 1)],
)
@pytest.mark.parametrize("visible_weight", [0.25, 1])
def test_what_is_visible_counts_with_its_weight(
    mask_mode, mask_bands, visible_weight
):
    mae = small_mae(
        mask_mode=mask_mode,
        mask_bands=mask_bands,
        visible_weight=visible_weight,
    )
    loss, prediction, target, hidden = mae(music())
    for i in range(3):
        errors = (prediction[i] - target[i]).square()
        visible = errors[~hidden[i]]
        total = errors[hidden[i]].sum() + visible_weight * visible.sum()
        weights = hidden[i].sum() + visible_weight * len(visible)
        torch.testing.assert_close(loss[i], total / weights)


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_only_what_is_hidden_is_learned(mask_mode):
    mae = small_mae(mask_mode=mask_mode)
    result = mae(music())
    (gradient,) = torch.autograd.grad(result.loss.sum(), result.prediction)
    assert torch.equal(gradient != 0, result.hidden)


def test_target_is_what_a_masknet_sees():
    mae = small_mae()
    mix_w = music()
    assert torch.equal(mae(mix_w).target, mae.features.spectrogram(mix_w))


def test_normalised_target_has_mean_zero_and_variance_one():
    target = small_mae(normalise_target=True)(music()).target
    zeros, ones = torch.zeros(3, FRAMES), torch.ones(3, FRAMES)
    torch.testing.assert_close(target.mean(-1), zeros, atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), ones, atol=1e-3, rtol=0)
    # it asks for the shape of a frame, not for its level
    louder = music()
    louder[..., : FRAMES // 2] *= 100
    plain = small_mae(normalise_target=False)(louder).target.mean(-1)
    assert (plain[:, 0] - plain[:, -1]).abs().min() > 0.5


# --- what the encoder sees ---------------------------------------------------


def real_music():
    """What a network without normalisation sees as it is."""
    return torch.randn(3, CHANNELS, FRAMES)


def where_hidden(hidden, one, other):
    """Inputs [batch, channels, frames] put together by a mask."""
    return torch.where(hidden.transpose(1, 2), one, other)


@pytest.mark.parametrize(
    ("mask_mode", "mask_bands"),
    [("zero", 1), ("noise", 1), ("drop", 1), ("zero", 3), ("noise", 3)],
)
def test_hidden_values_do_not_leak(mask_mode, mask_bands):
    mae = small_mae("none", mask_mode=mask_mode, mask_bands=mask_bands)
    x, other = real_music(), 10 * real_music()
    before = mae(x, seeded())
    hidden = before.hidden
    after = mae(where_hidden(hidden, other, x), seeded())
    assert torch.equal(after.hidden, hidden)
    assert torch.equal(after.prediction, before.prediction)
    assert not torch.equal(after.loss, before.loss)
    # and what is not hidden matters, in each item
    after = mae(where_hidden(hidden, x, other), seeded())
    change = (after.prediction - before.prediction)[hidden].abs()
    assert change.min() > 0


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_hidden_values_get_no_gradient(mask_mode):
    mae = small_mae("none", mask_mode=mask_mode)
    x = real_music().requires_grad_()
    result = mae(x)
    result.prediction.sum().backward()
    assert torch.equal(x.grad.transpose(1, 2) == 0, result.hidden)


@pytest.mark.parametrize("mask_mode", ["zero", "noise"])
def test_hidden_frames_are_seen_as_zero_or_noise(mask_mode):
    mae = small_mae("none", mask_mode=mask_mode, mask_ratio=0.5)
    seen = []
    mae.features.embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    x = torch.randn(8, CHANNELS, 500)
    hidden = mae(x, seeded()).hidden
    (seen,) = seen
    assert torch.equal(seen[~hidden], x.transpose(1, 2)[~hidden])
    blank = seen[hidden]
    if mask_mode == "zero":
        assert not blank.any()
    else:
        assert blank.mean().abs() < 0.02
        assert blank.var().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_masks_and_noise_come_from_the_generator(mask_mode):
    mae = small_mae(mask_mode=mask_mode)
    mix_w = music()
    first = mae(mix_w, seeded())
    torch.manual_seed(5)
    again, other = mae(mix_w, seeded()), mae(mix_w, seeded(2))
    for one, two in zip(first, again):
        assert torch.equal(one, two)
    assert not torch.equal(first.hidden, other.hidden)


@pytest.mark.parametrize("mask_ratio", [0.1, 0.3, 0.75, 0.95])
@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_tokens_of_the_encoder_fall_with_the_ratio(mask_mode, mask_ratio):
    mae = small_mae(mask_mode=mask_mode, mask_ratio=mask_ratio)
    shapes = []
    for part in (mae.features.encoder, mae.decoder):
        part.register_forward_pre_hook(
            lambda module, inputs: shapes.append(list(inputs[0].shape))
        )
    mae(music())
    visible = FRAMES - round(mask_ratio * FRAMES)
    tokens = visible if mask_mode == "drop" else FRAMES
    assert shapes == [[3, tokens, 16], [3, FRAMES, 8]]


def plain_drop(mae, spectrogram, hidden):
    """The prediction of mask_mode drop, item by item and frame by frame."""
    positions = mae.features.encoder.positions(spectrogram.shape[1])
    predictions = []
    for item, is_hidden in zip(spectrogram, hidden):
        visible = [t for t in range(len(item)) if not is_hidden[t]]
        x = torch.stack([mae.features.embedding(item[t]) for t in visible])
        where = torch.stack([positions[t] for t in visible])
        encoded = mae.features.encoder(x[None], positions=where[None])[0]
        tokens = [mae.mask_token] * len(item)
        for token, t in zip(mae.to_decoder(encoded), visible):
            tokens[t] = token
        decoded = mae.decoder(torch.stack(tokens)[None])
        predictions.append(mae.head(decoded)[0])
    return torch.stack(predictions)


@pytest.mark.parametrize("mask_ratio", [0.3, 0.99])
@pytest.mark.parametrize("mask_span", [1, 3])
def test_drop_equals_a_plain_implementation(mask_ratio, mask_span):
    mae = small_mae(
        mask_mode="drop", mask_ratio=mask_ratio, mask_span=mask_span
    )
    mix_w = music()
    result = mae(mix_w)
    expected = plain_drop(
        mae, mae.features.spectrogram(mix_w), result.hidden[..., 0]
    )
    torch.testing.assert_close(result.prediction, expected)


@pytest.mark.parametrize("mask_mode", ["zero", "noise"])
def test_encoder_is_the_one_of_a_masknet(mask_mode):
    # nothing but what is seen differs from what the masknet computes
    mae = small_mae("none", mask_mode=mask_mode)
    seen, encoded = [], []
    mae.features.embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    mae.to_decoder.register_forward_pre_hook(
        lambda module, inputs: encoded.append(inputs[0])
    )
    mae(real_music())
    expected = mae.features(seen[0].transpose(1, 2))
    torch.testing.assert_close(encoded[0], expected)


def test_batch_neighbours_do_not_matter():
    mae = small_mae(mask_mode="drop")
    mix_w = music()
    mix_w[1] *= 1e3
    mix_w[2] = 0.0
    together = mae(mix_w)
    expected = [
        plain_drop(
            mae,
            mae.features.spectrogram(mix_w[i : i + 1]),
            together.hidden[i : i + 1, :, 0],
        )
        for i in range(3)
    ]
    torch.testing.assert_close(together.prediction, torch.cat(expected))


# --- training ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask_mode", "decoder_layers"),
    [("zero", 0), ("zero", 1), ("noise", 0), ("noise", 2), ("drop", 1)],
)
def test_every_weight_gets_a_gradient(mask_mode, decoder_layers):
    mae = small_mae(mask_mode=mask_mode, decoder_layers=decoder_layers)
    mae(music()).loss.mean().backward()
    assert len(mae.decoder.layers) == decoder_layers
    for name, parameter in mae.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("spec_norm", ["zscore", "minmax", "none"])
@pytest.mark.parametrize("normalise_target", [False, True])
@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_silence_gives_finite_losses_and_gradients(
    mask_mode, normalise_target, spec_norm
):
    mae = small_mae(
        spec_norm, mask_mode=mask_mode, normalise_target=normalise_target
    )
    mix_w = music()
    mix_w[0] = 0.0
    mix_w[1, :, FRAMES // 2 :] = 0.0
    result = mae(mix_w)
    result.loss.mean().backward()
    for tensor in result[:3]:
        assert tensor.isfinite().all()
    for name, parameter in mae.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_two_frames_are_enough(mask_mode):
    result = small_mae(mask_mode=mask_mode, mask_ratio=0.01)(music(2, 2))
    assert result.hidden[..., 0].sum(1).tolist() == [1, 1]
    assert result.loss.isfinite().all()


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_a_small_batch_is_learned(mask_mode):
    mae = small_mae("none", mask_mode=mask_mode)
    # every channel a sine in time: a frame follows from the others
    time = torch.arange(FRAMES) / FRAMES
    tones = torch.randint(1, 4, (2, CHANNELS, 1), generator=seeded())
    x = 1.4 * (2 * torch.pi * tones * time).sin()
    optimizer = torch.optim.AdamW(mae.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = mae(x).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_autocast_is_near_to_single_precision(mask_mode, device):
    mae = small_mae(mask_mode=mask_mode).to(device)
    mix_w = music().to(device)

    def generator():
        return torch.Generator(device).manual_seed(1)

    expected = mae(mix_w, generator())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = mae(mix_w, generator())
    result.loss.mean().backward()
    assert torch.equal(result.hidden, expected.hidden)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(
        result.prediction.float(), expected.prediction, atol=0.05, rtol=0
    )
    torch.testing.assert_close(result.loss, expected.loss, atol=0.05, rtol=0)
    for name, parameter in mae.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_checkpointing_reaches_encoder_and_decoder(mask_mode):
    plain, saving = (
        small_mae(mask_mode=mask_mode, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    saving.load_state_dict(plain.state_dict())
    assert saving.features.encoder.checkpointing
    assert saving.decoder.checkpointing
    mix_w, losses = music(), []
    for mae in (plain, saving):
        losses.append(mae(mix_w, seeded()).loss)
        losses[-1].sum().backward()
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-7, rtol=1e-5)


def test_redraw_reaches_encoder_and_decoder():
    mae = small_mae(decoder_layers=2)
    before = {key: value.clone() for key, value in mae.state_dict().items()}
    drawn = []
    for _ in range(2):
        mae.redraw_projections(seeded())
        drawn.append(
            {key: value.clone() for key, value in mae.state_dict().items()}
        )
    changed = {
        key for key in before if not torch.equal(before[key], drawn[0][key])
    }
    assert changed == {
        "features.encoder.layers.0.attention.projection",
        "decoder.layers.0.attention.projection",
        "decoder.layers.1.attention.projection",
    }
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in before)


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask_mode": "blank"},
            "mask_mode must be one of zero, noise, drop, mix, got 'blank'",
        ),
        (
            {"mask_ratio": "half"},
            r"expected mask_ratio in \(0, 1\), got 'half'",
        ),
        ({"mask_ratio": None}, r"expected mask_ratio in \(0, 1\), got None"),
        ({"mask_span": 1.5}, "expected a whole mask_span from 1, got 1.5"),
        ({"mask_bands": 1.5}, "expected mask_bands from 1 to .*, got 1.5"),
        ({"mask_ratio": 0}, r"expected mask_ratio in \(0, 1\), got 0"),
        ({"mask_ratio": 1.0}, r"expected mask_ratio in \(0, 1\), got 1.0"),
        ({"mask_ratio": -0.3}, r"expected mask_ratio in \(0, 1\), got -0.3"),
        ({"mask_ratio": float("nan")}, r"mask_ratio in \(0, 1\), got nan"),
        ({"visible_weight": -0.1}, r"visible_weight in \[0, 1\], got -0.1"),
        ({"visible_weight": 2}, r"visible_weight in \[0, 1\], got 2"),
        ({"visible_weight": None}, r"visible_weight in \[0, 1\], got None"),
        ({"mask_span": 0}, "expected a whole mask_span from 1, got 0"),
        ({"mask_bands": 0}, "mask_bands from 1 to 10, .* channels, got 0"),
        ({"mask_bands": 11}, "mask_bands from 1 to 10, .* channels, got 11"),
        (
            {"mask_mode": "drop", "mask_bands": 2},
            "mask_mode drop leaves out whole frames, expected mask_bands 1, "
            "got 2",
        ),
        (
            # the encoder would get no gradient
            {"mask_mode": "drop", "decoder_layers": 0},
            "expected decoder_layers from 1 with mask_mode drop, got 0",
        ),
        ({"decoder_layers": -1}, "expected decoder_layers from 0 .* got -1"),
        ({"decoder_nhead": 3}, "got decoder_nhead=3 with d_decoder=8"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**options)


@pytest.mark.parametrize("shape", [(2, CHANNELS + 1, 5), (CHANNELS, 5)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, 10, frames\], got \["):
        small_mae()(torch.zeros(shape))


# --- under other music -------------------------------------------------------


def covered(mae, mix_w, cover, seed=1):
    """The result, and what the embedding sees [batch, frames, channels]."""
    seen = []
    hook = mae.features.embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    result = mae(mix_w, seeded(seed), cover)
    hook.remove()
    (seen,) = seen
    return result, seen


@pytest.mark.parametrize("mask_bands", [1, 3])
def test_other_music_is_added_to_what_is_hidden(mask_bands):
    mae = small_mae("none", mask_mode="mix", mask_bands=mask_bands)
    x, cover = music().abs(), music().abs()
    result, seen = covered(mae, x, cover)
    hidden = result.hidden
    assert hidden.any() and not hidden.all()
    total = (x + cover).transpose(1, 2)
    torch.testing.assert_close(seen[hidden], total[hidden])
    torch.testing.assert_close(seen[~hidden], x.transpose(1, 2)[~hidden])
    torch.testing.assert_close(result.target, x.transpose(1, 2))


def test_spectra_are_added_with_their_phases():
    mae = small_mae(mask_mode="mix")
    x = music()
    result, seen = covered(mae, x, -x)
    # what cancels is as soft as can be
    assert seen[result.hidden].max() < seen[~result.hidden].min() + 1e-6


@pytest.mark.parametrize("spec_norm", ["zscore", "minmax", "band_zscore"])
def test_target_is_normalised_as_what_is_seen(spec_norm):
    mae = small_mae(spec_norm, mask_mode="mix")
    result, seen = covered(mae, music(), 30 * music())
    shown = ~result.hidden
    torch.testing.assert_close(result.target[shown], seen[shown])
    # the cover is louder, so what is below it is less than what is seen
    assert (result.target < seen)[result.hidden].float().mean() > 0.95


def test_cover_of_what_is_not_hidden_does_not_count():
    mae = small_mae(mask_mode="mix")
    x, cover = music(), music()
    before = mae(x, seeded(), cover)
    hidden = before.hidden.transpose(1, 2)
    after = mae(x, seeded(), torch.where(hidden, cover, 9 * cover))
    assert torch.equal(after.loss, before.loss)
    after = mae(x, seeded(), torch.where(hidden, 9 * cover, cover))
    assert not torch.equal(after.loss, before.loss)


def test_learning_to_look_below_other_music():
    """What is below is told by what is around: steady tones under noise."""
    mae = small_mae("none", mask_mode="mix", mask_ratio=0.5)
    optimizer = torch.optim.Adam(mae.parameters(), 0.01)
    losses = []
    for _ in range(250):
        x = torch.randn(8, CHANNELS, 1).expand(-1, -1, FRAMES)
        result = mae(x, None, torch.randn(8, CHANNELS, FRAMES))
        losses.append(result.loss.mean().item())
        optimizer.zero_grad()
        result.loss.mean().backward()
        optimizer.step()
    # a frame alone leaves a variance of 1 / 2
    assert sum(losses[-50:]) / 50 < 0.44 < 0.8 < losses[0]


def test_cover_only_where_it_belongs():
    with pytest.raises(ValueError, match=r"with mask_mode mix, .* and none"):
        small_mae(mask_mode="mix")(music())
    with pytest.raises(ValueError, match="mask_mode zero and a cover"):
        small_mae(mask_mode="zero")(music(), None, music())
