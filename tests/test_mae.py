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
SIZES = {"d_model": 16, "nhead": 2, "num_layers": 1, "d_ffn": 16}


def small_mae(spec_norm="zscore", **options):
    """10 channels, one layer on either side, no dropout."""
    features = SpectrogramEncoder(
        CHANNELS, **SIZES, n_features=16, dropout=0.0, spec_norm=spec_norm
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


@given(
    frames=st.integers(2, 60),
    mask_ratio=st.floats(0.001, 0.999),
    mask_span=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_share_is_exact_and_all_spans_but_one_are_whole(
    frames, mask_ratio, mask_span, seed
):
    frames = max(frames, mask_span)
    hidden = draw_hidden_frames(4, frames, mask_ratio, mask_span, seeded(seed))
    count = min(max(round(mask_ratio * frames), 1), frames - 1)
    assert hidden.sum(1).tolist() == [count] * 4
    assert all(cut_spans(item, mask_span) <= 1 for item in hidden)


def test_bands_are_masked_each_by_itself():
    hidden = small_mae(mask_bands=3, mask_span=2)(music()).hidden
    # bands of neighbouring channels, of equal width within one channel
    bands = hidden.split([4, 3, 3], dim=2)
    for band in bands:
        assert torch.equal(band, band[..., :1].expand_as(band))
        assert band[..., 0].sum(1).tolist() == [6, 6, 6]
        assert all(cut_spans(item, 2) <= 1 for item in band[..., 0])
    assert not torch.equal(bands[0][..., 0], bands[1][..., 0])


# --- what is compared --------------------------------------------------------


@pytest.mark.parametrize(
    ("mask_mode", "mask_bands"),
    [("zero", 1), ("zero", 3), ("noise", 3), ("drop", 1)],
)
@pytest.mark.parametrize("visible_weight", [0, 0.25])
def test_what_is_hidden_is_compared_and_the_rest_with_its_weight(
    mask_mode, mask_bands, visible_weight
):
    mae = small_mae(
        mask_mode=mask_mode,
        mask_bands=mask_bands,
        visible_weight=visible_weight,
    )
    mix_w = music()
    loss, prediction, target, hidden = mae(mix_w)
    assert torch.equal(target, mae.features.spectrogram(mix_w))
    for i in range(3):
        errors = (prediction[i] - target[i]).square()
        visible = errors[~hidden[i]]
        total = errors[hidden[i]].sum() + visible_weight * visible.sum()
        weights = hidden[i].sum() + visible_weight * len(visible)
        torch.testing.assert_close(loss[i], total / weights)


# --- what the encoder sees ---------------------------------------------------


def observed(mae, mix_w, cover=None):
    """The result, and what the embedding sees [batch, frames, channels]."""
    seen = []
    hook = mae.features.embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    result = mae(mix_w, seeded(), cover)
    hook.remove()
    (seen,) = seen
    return result, seen


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


@pytest.mark.parametrize("mask_mode", ["zero", "noise"])
def test_hidden_frames_are_seen_as_zero_or_noise(mask_mode):
    mae = small_mae("none", mask_mode=mask_mode, mask_ratio=0.5)
    x = torch.randn(8, CHANNELS, 500)
    result, seen = observed(mae, x)
    hidden = result.hidden
    assert torch.equal(seen[~hidden], x.transpose(1, 2)[~hidden])
    blank = seen[hidden]
    if mask_mode == "zero":
        assert not blank.any()
    else:
        assert blank.mean().abs() < 0.02
        assert blank.var().item() == pytest.approx(1.0, abs=0.03)


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
def test_drop_equals_a_plain_implementation(mask_ratio):
    mae = small_mae(mask_mode="drop", mask_ratio=mask_ratio, mask_span=3)
    mix_w = music()
    # each item is seen as if it were alone
    mix_w[1] *= 1e3
    mix_w[2] = 0.0
    tokens = []
    mae.features.encoder.register_forward_pre_hook(
        lambda module, inputs: tokens.append(inputs[0].shape[1])
    )
    result = mae(mix_w)
    assert tokens == [FRAMES - int(result.hidden[0, :, 0].sum())]
    expected = [
        plain_drop(
            mae,
            mae.features.spectrogram(mix_w[i : i + 1]),
            result.hidden[i : i + 1, :, 0],
        )
        for i in range(3)
    ]
    torch.testing.assert_close(result.prediction, torch.cat(expected))


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
@pytest.mark.parametrize("mask_mode", HIDING_MODES)
def test_silence_gives_finite_losses_and_gradients(mask_mode, spec_norm):
    mae = small_mae(spec_norm, mask_mode=mask_mode)
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
    assert all(p.grad.isfinite().all() for p in mae.parameters())


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_mode": "blank"}, "one of zero, noise, drop, mix, got 'blank'"),
        ({"mask_ratio": 1.0}, r"mask_ratio in \(0, 1\), got 1.0"),
        ({"visible_weight": 2}, r"visible_weight in \[0, 1\], got 2"),
        ({"mask_span": 1.5}, "expected a whole mask_span from 1, got 1.5"),
        ({"mask_bands": 11}, "mask_bands from 1 to 10, .* channels, got 11"),
        (
            {"mask_mode": "drop", "mask_bands": 2},
            "drop leaves out whole frames, expected mask_bands 1, got 2",
        ),
        (
            # the encoder would get no gradient
            {"mask_mode": "drop", "decoder_layers": 0},
            "expected decoder_layers from 1 with mask_mode drop, got 0",
        ),
        ({"decoder_nhead": 3}, "got decoder_nhead=3 with d_decoder=8"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**options)


# --- under other music -------------------------------------------------------


@pytest.mark.parametrize("mask_bands", [1, 3])
def test_other_music_is_added_to_what_is_hidden(mask_bands):
    mae = small_mae("none", mask_mode="mix", mask_bands=mask_bands)
    x, cover = music().abs(), music().abs()
    result, seen = observed(mae, x, cover)
    hidden = result.hidden
    assert hidden.any() and not hidden.all()
    total = (x + cover).transpose(1, 2)
    torch.testing.assert_close(seen[hidden], total[hidden])
    torch.testing.assert_close(seen[~hidden], x.transpose(1, 2)[~hidden])
    torch.testing.assert_close(result.target, x.transpose(1, 2))


@pytest.mark.parametrize("spec_norm", ["zscore", "minmax", "band_zscore"])
def test_target_is_normalised_as_what_is_seen(spec_norm):
    mae = small_mae(spec_norm, mask_mode="mix")
    result, seen = observed(mae, music(), 30 * music())
    shown = ~result.hidden
    torch.testing.assert_close(result.target[shown], seen[shown])
    # the cover is louder, so what is below it is less than what is seen
    assert (result.target < seen)[result.hidden].float().mean() > 0.95


def test_cover_only_where_it_belongs():
    with pytest.raises(ValueError, match=r"with mask_mode mix, .* and none"):
        small_mae(mask_mode="mix")(music())
    with pytest.raises(ValueError, match="mask_mode zero and a cover"):
        small_mae(mask_mode="zero")(music(), None, music())
