"""How near a call comes to what a GPU can do, measured on the same GPU."""

import statistics

import torch

# Some 25 ms, in which the longest call here is queued several times over.
SLEEP_CYCLES = 50_000_000


def device_seconds(call, device, repetitions):
    """Median seconds that a GPU works on a call, without its launching.

    The GPU sleeps until the call is queued in full, and runs it without gaps.
    """
    seconds = []
    with torch.cuda.device(device):
        for _ in range(repetitions):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def peak_flops(dtype, device, size=8192):
    """FLOP/s of a product of two large square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    a @ b
    return 2 * size**3 / device_seconds(lambda: a @ b, device, 10)


def peak_bytes(device, size=2**30):
    """Bytes/s read and written while copying."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = source.clone()
    seconds = device_seconds(lambda: target.copy_(source), device, 10)
    return 2 * size / seconds


def achieved(flops, bytes_moved, seconds, peaks):
    """What a call achieves, as text, beside the peaks.

    Arguments
    ---------
    flops, bytes_moved : float
        Of the call.
    seconds : float
        What it takes.
    peaks : tuple of float
        Peak FLOP/s and bytes/s.

    Returns
    -------
    str
        Both rates, their shares of the peaks, and which is nearer to its peak
        and so binds.

    Example
    -------
    >>> achieved(3e12, 1e9, 0.01, (6e14, 1e12))
    '300 TFLOP/s, 50 % of 600; 100 GB/s, 10 % of 1000; matrix products bind'
    """
    rates = flops / seconds, bytes_moved / seconds
    shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
    bound = "matrix products bind" if shares[0] > shares[1] else "memory binds"
    return (
        f"{rates[0] / 1e12:.3g} TFLOP/s, {100 * shares[0]:.0f} % of "
        f"{peaks[0] / 1e12:.3g}; {rates[1] / 1e9:.4g} GB/s, "
        f"{100 * shares[1]:.0f} % of {peaks[1] / 1e9:.4g}; {bound}"
    )
