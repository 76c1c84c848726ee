"""Measures: against enumeration, known values, silence, never NaN."""

import math

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.objectives.metrics import (
    LIMIT_DB,
    effective_mask_count,
    mask_overlap,
    mixture_si_snr,
    sdr,
    si_snr,
    si_snri,
    si_snri_grouped,
)

SEEDS = st.integers(0, 2**31)


def item(num_sources=4, num_stems=3, time=80):
    """Noisy pieces of stems, the stems and their sum."""
    stems = torch.randn(num_stems, time)
    owner = torch.arange(num_sources) % num_stems
    est_source = stems[owner] * torch.rand(num_sources, 1)
    est_source = est_source + 0.5 * torch.randn(num_sources, time)
    return est_source[torch.randperm(num_sources)], stems, stems.sum(0)


# -- si_snr


def test_si_snr_equals_the_angle():
    estimate, target = torch.randn(2, 3, 100)
    value = si_snr(estimate, target)
    for i in range(3):
        expected = references.si_snr(estimate[i], target[i])
        assert float(value[i]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("level", [-20.0, 0.0, 30.0])
def test_si_snr_of_orthogonal_noise_is_its_level(level):
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    target, noise = torch.sin(3 * angle), torch.sin(5 * angle)
    estimate = target + 10 ** (-level / 20) * noise
    assert float(si_snr(estimate, target)) == pytest.approx(level, abs=1e-3)
    # neither gain, sign nor offset matter
    for changed in (0.01 * estimate, -estimate, estimate + 0.3):
        assert float(si_snr(changed, target)) == pytest.approx(level, abs=0.01)


def test_si_snr_has_limits():
    target = torch.randn(100).double()
    silent = torch.zeros(100).double()
    assert float(si_snr(target, target)) == LIMIT_DB
    for estimate, reference in (
        (silent, target),
        (target, silent),
        (silent, silent),
    ):
        assert float(si_snr(estimate, reference)) == pytest.approx(-LIMIT_DB)


# -- si_snri and si_snri_grouped


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
@pytest.mark.parametrize("level", [0.0, 1e-3])
def test_a_stem_alone_is_nothing_to_separate(measure, level):
    est_source, stems, _ = item(3, 2)
    stems = stems * torch.tensor([[1.0], [level]])
    improvement, num_silent = measure(est_source, stems, stems.sum(0))
    assert improvement is None
    assert num_silent == 1


@given(num_sources=st.integers(1, 5), num_stems=st.integers(2, 4), seed=SEEDS)
def test_choices_equal_enumeration(num_sources, num_stems, seed):
    torch.manual_seed(seed)
    est_source, stems, mix = item(num_sources, num_stems)
    mix = mix + 0.1 * torch.randn_like(mix)
    grouped, num_silent = si_snri_grouped(est_source, stems, mix)
    expected = references.si_snri_grouped(est_source, stems, mix)
    assert grouped == pytest.approx(expected, abs=1e-3)
    assert num_silent == 0
    if num_sources >= num_stems:
        improvement, num_silent = si_snri(est_source, stems, mix)
        expected = references.si_snri(est_source, stems, mix)
        assert improvement == pytest.approx(expected, abs=1e-3)
        assert num_silent == 0


@given(num_stems=st.integers(2, 5), seed=SEEDS)
def test_grouping_as_many_sources_as_stems_is_choosing(num_stems, seed):
    """Each stem gets one, so that the two measures agree."""
    torch.manual_seed(seed)
    args = item(num_stems, num_stems)
    assert si_snri_grouped(*args)[0] == pytest.approx(
        si_snri(*args)[0], abs=1e-3
    )


def test_grouping_repairs_over_separation():
    stems = torch.randn(2, 500)
    share = torch.rand(3, 500).softmax(0)
    # the first stem in three pieces
    est_source = torch.cat([share * stems[0], stems[1:]])
    mix = stems.sum(0)
    assert si_snri_grouped(est_source, stems, mix)[0] > 100
    assert si_snri(est_source, stems, mix)[0] < 80
    # a source of noise has to go somewhere, but may be left out one-to-one
    noisy = torch.cat([stems, torch.randn(1, 500)])
    assert si_snri_grouped(noisy, stems, mix)[0] < 80
    assert si_snri(noisy, stems, mix)[0] > 100


def test_the_mixture_improves_nothing():
    _, stems, mix = item(2, 2)
    for measure in (si_snri, si_snri_grouped):
        improvement, _ = measure(mix.expand(2, -1), stems, mix)
        assert improvement == pytest.approx(0.0, abs=1e-3)


def test_known_improvement():
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    stems = torch.stack([torch.sin(k * angle) for k in (2, 3)])
    noise = torch.stack([torch.sin(k * angle) for k in (7, 9)])
    est_source = (stems + 0.1 * noise).flip(0)
    # 20 dB where the mixture has 0
    for measure in (si_snri, si_snri_grouped):
        improvement, _ = measure(est_source, stems, stems.sum(0))
        assert improvement == pytest.approx(20.0, abs=1e-2)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_silent_stems_are_left_out_and_counted(measure):
    est_source, stems, mix = item(4, 2)
    padded = torch.stack(
        [stems[0], torch.zeros(80), stems[1], 1e-5 * torch.randn(80)]
    )
    improvement, num_silent = measure(est_source, padded, mix)
    assert num_silent == 2
    assert improvement == pytest.approx(measure(est_source, stems, mix)[0])
    assert measure(est_source, torch.zeros(3, 80), mix) == (None, 3)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_a_mean_is_no_sound(measure):
    """SI-SNR takes it out, and would be -120 dB of what is left."""
    est_source, stems, mix = item(4, 2)
    offset = torch.tensor([[1e-3], [-0.4]])
    expected = measure(est_source, stems, mix)[0]
    steady = offset.expand(2, 80)
    found, num_silent = measure(est_source, torch.cat([stems, steady]), mix)
    assert (found, num_silent) == (pytest.approx(expected), 2)
    # nor does it make a stem the loudest
    soft = torch.stack([stems[0] + 500.0, stems[1]])
    found, num_silent = measure(est_source, soft, mix)
    assert (found, num_silent) == (pytest.approx(expected, abs=1e-2), 0)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_stems_without_a_source_improve_by_nothing(measure):
    stems = torch.randn(4, 300)
    mix = stems.sum(0)
    one = measure(stems[:1], stems, mix)[0]
    gain = LIMIT_DB - float(si_snr(mix, stems[0]))
    assert one == pytest.approx(gain / 4, rel=0.1)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_silence_is_no_improvement(measure):
    """Though a stem below the mixture's noise has an SI-SNR below 0 dB."""
    stems = torch.randn(2, 300)
    mix = stems.sum(0) + 3 * torch.randn(300)
    assert measure(torch.zeros(3, 300), stems, mix) == (0.0, 0)
    est_source = stems + 0.3 * torch.randn(2, 300)
    expected = measure(est_source, stems, mix)
    silent = torch.zeros(2, 300)
    silent[1] = 0.5
    padded = torch.cat([silent, est_source])
    assert measure(padded, stems, mix) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_order_of_sources_and_stems_does_not_matter(measure):
    est_source, stems, mix = item(5, 3)
    expected = measure(est_source, stems, mix)
    again = measure(est_source.flip(0), stems.roll(1, 0), mix)
    assert again == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])
def test_shapes_that_do_not_fit_are_named(measure):
    est_source, stems, mix = item()
    for args in (
        (est_source[:, 1:], stems, mix),
        (est_source, stems[None], mix),
        (est_source, stems, mix[None]),
    ):
        with pytest.raises(ValueError, match=r"mix \[time\], got \["):
            measure(*args)


def test_too_many_sources_to_group_are_refused():
    with pytest.raises(ValueError, match=r"at most 12 sources.*got 13"):
        si_snri_grouped(*item(13, 2))


# -- sdr


def test_sdr_is_near_to_si_snr_for_additive_noise():
    stems = torch.randn(2, 16000)
    for level in (0.0, 10.0, 20.0):
        estimate = stems + 10 ** (-level / 20) * torch.randn(2, 16000)
        value = sdr(estimate.flip(0), stems)
        assert value == pytest.approx(level, abs=0.5)
        # 512 taps can only fit better
        assert value >= float(si_snr(estimate, stems).mean()) - 0.01


def test_sdr_forgives_a_filter():
    stem = torch.randn(1, 8000)
    delayed = stem.roll(3, 1)
    assert float(si_snr(delayed, stem)) < 0
    assert sdr(delayed, stem) > 20


def test_sdr_is_finite_for_perfect_short_and_tonal_signals():
    stems = torch.randn(2, 2000)
    assert sdr(stems, stems) > 60
    assert math.isfinite(sdr(stems[:, :100], stems[:, :100]))
    # a pure tone has singular equations
    tone = torch.sin(torch.arange(4000) * 0.1).unsqueeze(0)
    assert math.isfinite(sdr(tone + 0.01 * torch.randn(1, 4000), tone))


def test_sdr_leaves_silence_out_as_si_snri_does():
    stems = torch.randn(2, 2000)
    est_source = stems + torch.randn(2, 2000)
    silent = torch.zeros(1, 2000)
    expected = sdr(est_source, stems)
    assert sdr(est_source, torch.cat([silent, stems])) == pytest.approx(
        expected
    )
    assert sdr(torch.cat([silent, est_source]), stems) == pytest.approx(
        expected
    )
    assert sdr(est_source, silent) is None
    assert sdr(silent, stems) is None
    # quiet is not silent: a gain makes no difference
    assert sdr(1e-6 * est_source, stems) == pytest.approx(expected, abs=0.01)


# -- mixture_si_snr


def test_mixture_si_snr_is_that_of_the_best_remix():
    est_source, mixtures = torch.randn(2, 4, 100), torch.randn(2, 2, 100)
    value = mixture_si_snr(est_source, mixtures)
    loss, _ = references.mixit(est_source, mixtures, "si_snr")
    torch.testing.assert_close(value, -loss.float(), atol=1e-3, rtol=1e-4)


def test_mixture_si_snr_is_not_rounded_in_mixed_precision():
    mixtures = torch.randn(1, 2, 4000)
    est_source = mixtures + 1e-3 * torch.randn(1, 2, 4000)
    plain = mixture_si_snr(est_source, mixtures)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixture_si_snr(est_source, mixtures)
    assert 55 < plain.item() < 65
    assert mixed.item() == pytest.approx(plain.item(), abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped, sdr])
def test_sources_that_are_not_finite_are_refused(measure, value):
    stems = torch.randn(2, 1000)
    est_source = stems.clone()
    est_source[1, 5] = value
    mix = [] if measure is sdr else [stems.sum(0)]
    with pytest.raises(ValueError, match="finite sources, got NaN or infin"):
        measure(est_source, stems, *mix)
    with pytest.raises(ValueError, match="finite stems, got NaN or infin"):
        measure(stems, est_source, *mix)


def test_mixture_si_snr_does_not_depend_on_any_order():
    est_source, mixtures = torch.randn(2, 5, 100), torch.randn(2, 2, 100)
    expected = mixture_si_snr(est_source, mixtures)
    torch.testing.assert_close(
        mixture_si_snr(est_source, mixtures.flip(1)), expected
    )
    torch.testing.assert_close(
        mixture_si_snr(est_source.flip(1), mixtures), expected
    )


def test_mixture_si_snr_leaves_silent_mixtures_out():
    sources = torch.randn(1, 3, 100)
    mixtures = torch.stack([sources.sum(1), torch.zeros(1, 100)], 1)
    expected = si_snr(sources.sum(1), mixtures[:, 0])
    torch.testing.assert_close(mixture_si_snr(sources, mixtures), expected)
    mixtures[:, 1] = 1e-3
    torch.testing.assert_close(mixture_si_snr(sources, mixtures), expected)
    # nothing to compare with: documented, and for the item only
    mixtures = torch.cat([torch.zeros(1, 2, 100), torch.randn(1, 2, 100)])
    value = mixture_si_snr(torch.randn(2, 3, 100), mixtures)
    assert value.isnan().tolist() == [True, False]


# -- masks


def test_overlap_is_the_diversity_of_masks():
    masks = torch.rand(3, 4, 6, 7)
    torch.testing.assert_close(
        mask_overlap(masks), references.diversity(masks).float()
    )


def test_overlap_of_known_masks():
    assert mask_overlap(torch.eye(3)[None]).item() == 0.0
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert mask_overlap(opposite).item() == pytest.approx(-1.0, abs=1e-5)
    assert mask_overlap(torch.zeros(1, 3, 5)).item() == 0.0


def test_overlap_of_one_mask_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 masks.*got 1"):
        mask_overlap(torch.ones(2, 1, 3))


@given(num=st.integers(1, 8), power=st.floats(0, 6), seed=SEEDS)
def test_effective_mask_count_is_between_one_and_all(num, power, seed):
    torch.manual_seed(seed)
    masks = torch.rand(2, num, 4, 5) * torch.rand(2, num, 1, 1) ** power
    count = effective_mask_count(masks)
    assert (count >= 1 - 1e-5).all() and (count <= num + 1e-4).all()
    torch.testing.assert_close(
        effective_mask_count(3 * masks), count, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "energies, expected",
    [
        ([1, 1, 1, 1], 4.0),
        ([1, 0, 0, 0], 1.0),
        ([2, 2, 0, 0], 2.0),
        # entropy of (1/2, 1/4, 1/4): 1.5 bits
        ([2, 1, 1, 0], 2**1.5),
        ([0, 0, 0, 0], 1.0),
    ],
)
def test_effective_mask_count_of_known_energies(energies, expected):
    level = torch.tensor(energies).float().sqrt()
    masks = level[None, :, None, None].expand(1, 4, 3, 5)
    count = effective_mask_count(masks)
    torch.testing.assert_close(count, torch.tensor([expected]))


def test_inputs_are_left_alone():
    est_source, stems, mix = item()
    masks = torch.rand(2, 3, 4, 5)
    inputs = (est_source, stems, mix, masks)
    before = [x.clone() for x in inputs]
    si_snr(est_source[0], stems[0])
    si_snri(est_source, stems, mix)
    si_snri_grouped(est_source, stems, mix)
    sdr(est_source, stems)
    mixture_si_snr(est_source[None], stems[None])
    mask_overlap(masks)
    effective_mask_count(masks)
    for x, y in zip(inputs, before):
        assert torch.equal(x, y)
