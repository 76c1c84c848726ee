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
    pesq,
    sdr,
    si_sdr,
    si_snr,
    si_snri,
    si_snri_grouped,
    stem_si_snr,
)

SEEDS = st.integers(0, 2**31)
BOTH = pytest.mark.parametrize("measure", [si_snri, si_snri_grouped])


def item(num_sources=4, num_stems=3, time=80):
    """Noisy pieces of stems, the stems and their sum."""
    stems = torch.randn(num_stems, time)
    owner = torch.arange(num_sources) % num_stems
    est_source = stems[owner] * torch.rand(num_sources, 1)
    est_source = est_source + 0.5 * torch.randn(num_sources, time)
    return est_source[torch.randperm(num_sources)], stems, stems.sum(0)


# -- si_snr


@pytest.mark.parametrize("level", [-20.0, 0.0, 30.0])
def test_si_snr_of_orthogonal_noise_is_its_level(level):
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    target, noise = torch.sin(3 * angle), torch.sin(5 * angle)
    estimate = target + 10 ** (-level / 20) * noise
    # neither gain, sign nor offset matter
    for changed in (estimate, 0.01 * estimate, -estimate, estimate + 0.3):
        assert float(si_snr(changed, target)) == pytest.approx(level, abs=0.01)


def test_si_snr_has_limits():
    target, silent = torch.randn(100).double(), torch.zeros(100).double()
    assert float(si_snr(target, target)) == LIMIT_DB
    for pair in ((silent, target), (target, silent), (silent, silent)):
        assert float(si_snr(*pair)) == pytest.approx(-LIMIT_DB)


# -- si_snri and si_snri_grouped


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


@BOTH
def test_known_improvements(measure):
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    stems = torch.stack([torch.sin(k * angle) for k in (2, 3)])
    noise = torch.stack([torch.sin(k * angle) for k in (7, 9)])
    est_source, mix = (stems + 0.1 * noise).flip(0), stems.sum(0)
    # 20 dB where the mixture has 0
    improvement, _ = measure(est_source, stems, mix)
    assert improvement == pytest.approx(20.0, abs=1e-2)
    assert stem_si_snr(est_source, stems) == pytest.approx(20.0, abs=1e-2)
    assert measure(mix.expand(2, -1), stems, mix) == pytest.approx((0, 0))
    # a stem without a source improves by nothing
    improvement, _ = measure(est_source[:1], stems, mix)
    assert improvement == pytest.approx(10.0, abs=1e-2)


@BOTH
def test_silence_does_not_count(measure):
    est_source, stems, mix = item(4, 2)
    expected = measure(est_source, stems, mix)[0]
    # nor does what is constant, which SI-SNR takes out, or all but silent
    more = torch.stack(
        [torch.zeros(80), torch.full((80,), -0.4), 1e-5 * torch.randn(80)]
    )
    found = measure(est_source, torch.cat([more, stems]), mix)
    assert found == (pytest.approx(expected), 3)
    found = measure(torch.cat([more[:2], est_source]), stems, mix)
    assert found == (pytest.approx(expected), 0)
    # a mean does not make a stem the loudest
    soft = torch.stack([stems[0] + 500.0, stems[1]])
    found = measure(est_source, soft, mix)
    assert found == (pytest.approx(expected, abs=1e-2), 0)
    # a stem below the mixture's noise has an SI-SNR below 0 dB, and yet
    noisy = stems.sum(0) + 3 * torch.randn(80)
    assert measure(torch.zeros(3, 80), stems, noisy) == (0.0, 0)
    # a stem alone is nothing to separate
    for level in (0.0, 1e-3):
        alone = stems * torch.tensor([[1.0], [level]])
        assert measure(est_source, alone, alone.sum(0)) == (None, 1)


@BOTH
def test_inputs_that_do_not_fit_are_named(measure):
    est_source, stems, mix = item()
    for args in (
        (est_source[:, 1:], stems, mix),
        (est_source, stems[None], mix),
        (est_source, stems, mix[None]),
    ):
        with pytest.raises(ValueError, match=r"mix \[time\], got \["):
            measure(*args)
    with pytest.raises(ValueError, match=r"at most 12 sources.*got 13"):
        si_snri_grouped(*item(13, 2))


@pytest.mark.parametrize("measure", [si_snri, si_snri_grouped, sdr, si_sdr])
def test_samples_that_are_not_finite_are_refused(measure):
    stems = torch.randn(2, 1000)
    est_source = stems.clone()
    est_source[1, 5] = float("nan")
    mix = [] if measure in (sdr, si_sdr) else [stems.sum(0)]
    with pytest.raises(ValueError, match="finite sources, got NaN or infin"):
        measure(est_source, stems, *mix)
    with pytest.raises(ValueError, match="finite stems, got NaN or infin"):
        measure(stems, est_source, *mix)


# -- sdr


def test_sdr_is_near_to_si_snr_for_additive_noise():
    stems = torch.randn(2, 16000)
    for level in (0.0, 20.0):
        estimate = stems + 10 ** (-level / 20) * torch.randn(2, 16000)
        value = sdr(estimate.flip(0), stems)
        assert value == pytest.approx(level, abs=0.5)
    # 512 taps forgive a filter
    delayed = stems[:1].roll(3, 1)
    assert float(si_snr(delayed, stems[:1])) < 0
    assert sdr(delayed, stems[:1]) > 20


def test_sdr_is_finite_for_perfect_short_and_tonal_signals():
    stems = torch.randn(2, 2000)
    assert sdr(stems, stems) > 60
    assert math.isfinite(sdr(stems[:, :100], stems[:, :100]))
    # a pure tone has singular equations
    tone = torch.sin(torch.arange(4000) * 0.1).unsqueeze(0)
    assert math.isfinite(sdr(tone + 0.01 * torch.randn(1, 4000), tone))


@pytest.mark.parametrize("measure", [sdr, si_sdr, stem_si_snr])
def test_measures_of_stems_leave_silence_out(measure):
    stems, silent = torch.randn(2, 2000), torch.zeros(1, 2000)
    expected = measure(stems[:1] + stems[1:], stems)
    found = measure(stems[:1] + stems[1:], torch.cat([silent, stems]))
    assert found == pytest.approx(expected, abs=0.01)
    assert measure(stems, silent) is None
    assert measure(silent, stems) is None


def test_si_sdr_counts_a_mean_and_no_gain():
    angle = torch.arange(1000) * 2 * torch.pi / 1000
    stem = torch.sin(3 * angle).unsqueeze(0)
    # energies of 1/2 and 1/200
    assert si_sdr(5 * (stem + 0.005**0.5), stem) == pytest.approx(20, abs=0.01)
    assert stem_si_snr(5 * (stem + 0.005**0.5), stem) > 60


def test_pesq_of_the_vocals():
    pytest.importorskip("pesq")
    time = torch.arange(2 * 44100) / 44100
    syllables = (torch.sin(2 * torch.pi * 3 * time) > 0).float()
    vocals = sum(
        torch.sin(2 * torch.pi * 200 * k * time) / k for k in (1, 2, 3)
    )
    vocals = 0.1 * syllables * vocals
    noise = torch.randn(len(vocals))
    # the most there is, whatever the gain, by the source that has them
    best = pesq(torch.stack([noise, 0.5 * vocals]), vocals, 44100)
    assert best == pytest.approx(4.64, abs=0.01)
    worse = [
        pesq((vocals + level * noise).unsqueeze(0), vocals, 44100)
        for level in (0.001, 0.1)
    ]
    assert best > worse[0] > worse[1] >= 1
    for silent in (0 * vocals, vocals[:100]):
        assert pesq(noise[: len(silent)].unsqueeze(0), silent, 44100) is None


# -- mixture_si_snr


def test_mixture_si_snr_is_that_of_the_best_remix():
    est_source, mixtures = torch.randn(2, 4, 100), torch.randn(2, 2, 100)
    loss, _ = references.mixit(est_source, mixtures, "si_snr")
    for sources, targets in (
        (est_source, mixtures),
        (est_source.flip(1), mixtures.flip(1)),
    ):
        value = mixture_si_snr(sources, targets)
        torch.testing.assert_close(value, -loss.float(), atol=1e-3, rtol=1e-4)


def test_mixture_si_snr_leaves_silent_mixtures_out():
    sources = torch.randn(1, 3, 100)
    expected = si_snr(sources.sum(1), sources.sum(1)[:1])
    for level in (0.0, 1e-3):
        silent = torch.full((1, 100), level)
        mixtures = torch.stack([sources.sum(1), silent], 1)
        torch.testing.assert_close(mixture_si_snr(sources, mixtures), expected)
    # nothing to compare with: documented, and for the item only
    mixtures = torch.cat([torch.zeros(1, 2, 100), torch.randn(1, 2, 100)])
    value = mixture_si_snr(torch.randn(2, 3, 100), mixtures)
    assert value.isnan().tolist() == [True, False]


# -- masks


def test_overlap_of_masks():
    assert mask_overlap(torch.eye(3)[None]).item() == 0.0
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert mask_overlap(opposite).item() == pytest.approx(-1.0, abs=1e-5)
    assert mask_overlap(torch.zeros(1, 3, 5)).item() == 0.0


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
    for gain in (1, 3):
        count = effective_mask_count(gain * masks)
        torch.testing.assert_close(count, torch.tensor([expected]))
