"""Slow and obvious implementations that the fast code must equal.

Everything here loops, works in float64 and has no epsilon: signals of silence
are told apart by ``if``.
"""

import itertools

import torch


def softmax_attention(
    query, key, value, key_padding_mask=None, causal=False, log_decay=None
):
    """Attention frame by frame, [batch, heads, frames, dim]."""
    if log_decay is None:
        log_decay = torch.zeros(query.shape[1])
    output = torch.zeros_like(value)
    batch, heads, frames, _ = query.shape
    for b, h, t in itertools.product(*map(range, (batch, heads, frames))):
        seen = range(t + 1) if causal else range(key.shape[2])
        weights = {
            s: (query[b, h, t] @ key[b, h, s] + (t - s) * log_decay[h]).exp()
            for s in seen
            if key_padding_mask is None or not key_padding_mask[b, s]
        }
        total = sum(weights.values())
        for s, weight in weights.items():
            output[b, h, t] += weight / total * value[b, h, s]
    return output


def decibel(ratio):
    """10 log10."""
    return 10 * torch.log10(ratio)


def objective_loss(objective, estimates, targets, snr_max=30.0):
    """Mean objective over pairs of rows of two [mixtures, time]."""
    if objective == "si_snr":
        estimates = estimates - estimates.mean(1, keepdim=True)
        targets = targets - targets.mean(1, keepdim=True)
    everything = targets.square().mean(1).sum()
    losses = []
    for y, x in zip(estimates, targets):
        if objective == "mse":
            losses.append((x - y).square().mean())
            continue
        silent = x.square().mean() < 1e-8 * everything
        if objective == "snr" or silent:
            reference = everything if silent else x.square().mean()
            tau = 10 ** (-snr_max / 10)
            error = (x - y).square().mean()
            losses.append(decibel((error + tau * reference) / reference))
        elif y.square().sum() == 0:
            losses.append(decibel(torch.tensor(1e12, dtype=x.dtype)))
        else:
            projection = (x @ y) / (x @ x) * x
            losses.append(
                decibel(
                    (y - projection).square().sum() / projection.square().sum()
                )
            )
    return torch.stack(losses).mean()


def all_assignments(num_mixtures, num_sources):
    """All [mixtures, sources] matrices with one 1 in each column."""
    for owners in itertools.product(range(num_mixtures), repeat=num_sources):
        assignment = torch.zeros(num_mixtures, num_sources).double()
        for source, mixture in enumerate(owners):
            assignment[mixture, source] = 1.0
        yield assignment


def mixit(est_source, mixtures, objective, snr_max=30.0, assign_by=None):
    """MixIT by trying all assignments on waveforms in float64."""
    est_source, mixtures = est_source.double(), mixtures.double()
    losses, assignments = [], []
    for sources, targets in zip(est_source, mixtures):
        best, winner = None, None
        for assignment in all_assignments(len(targets), len(sources)):
            with torch.no_grad():
                loss = objective_loss(
                    assign_by or objective,
                    assignment @ sources,
                    targets,
                    snr_max,
                )
            if best is None or loss < best:
                best, winner = loss, assignment
        assignments.append(winner)
        losses.append(
            objective_loss(objective, winner @ sources, targets, snr_max)
        )
    return torch.stack(losses), torch.stack(assignments)


def diversity(masks):
    """Mean |cosine| over the pairs i != j, [batch, N, ...] -> [batch]."""
    values = []
    for item in masks.double():
        pairs = list(itertools.permutations(range(len(item)), 2))
        cosines = [
            (item[i] * item[j]).sum().abs()
            / (item[i].square().sum() * item[j].square().sum()).sqrt()
            for i, j in pairs
        ]
        values.append(sum(cosines) / len(pairs))
    return torch.stack(values)


def sparsity(est_source, mix):
    """Sum of the levels over the level of the mixture -> [batch]."""
    values = []
    for sources, whole in zip(est_source.double(), mix.double()):
        levels = [source.square().mean().sqrt() for source in sources]
        values.append(sum(levels) / whole.square().mean().sqrt())
    return torch.stack(values)


def si_snr(estimate, target):
    """SI-SNR in dB of two [time], computed as an angle."""
    estimate = estimate.double() - estimate.double().mean()
    target = target.double() - target.double().mean()
    cosine = estimate @ target / (estimate.norm() * target.norm())
    return float(decibel(cosine.square() / (1 - cosine.square())))


def si_snri(est_source, stems, mix):
    """Best one-to-one choice; at least as many sources as stems."""
    return max(
        sum(
            si_snr(est_source[source], stem) - si_snr(mix, stem)
            for source, stem in zip(chosen, stems)
        )
        / len(stems)
        for chosen in itertools.permutations(range(len(est_source)), len(stems))
    )


def si_snri_grouped(est_source, stems, mix):
    """Best of all ways to give each source to one stem."""
    spare = len(stems) > len(est_source)
    best = -float("inf")
    for owners in itertools.product(range(len(stems)), repeat=len(est_source)):
        total = 0.0
        for number, stem in enumerate(stems):
            group = [
                s for s, owner in zip(est_source, owners) if owner == number
            ]
            if group:
                total += si_snr(sum(group), stem) - si_snr(mix, stem)
            elif not spare:
                total = -float("inf")
        best = max(best, total / len(stems))
    return best
