"""Triton kernels of FAVOR+ attention, forward; see ``favor_triton``.

Features live in registers only. Notation, per batch item and head, with
``w_f`` the random directions: weights of keys ``exp(k . w_f - |k|^2 / 2)``,
their sums ``z_f`` and the sums ``S_f`` of weighted values (the state), and
weights of queries ``exp(q . w_f)``. A query's output is the mean of
``S_f / z_f`` under its weights times ``z_f``, which has the form of exact
attention with directions in the place of keys: the running maximum and the
logarithm of the sum are those of flash attention (arXiv 2205.14135).

Sums over frames are split among programs, each of which writes its own
partial sum: no atomics, the same bits in every run.
"""

import types

try:
    import triton
    from triton import language as tl
except ImportError:
    # the module can be imported and read, the kernels cannot be launched
    triton = None
    tl = types.SimpleNamespace(constexpr=None)


def jit(**options):
    """``triton.jit`` with options; without triton it changes nothing."""
    return triton.jit(**options) if triton else lambda function: function


@jit()
def load_rows(base, stride, first, count, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows [ROWS, D] from ``first`` on, zero from ``count`` on."""
    row = tl.arange(0, ROWS)
    base += tl.cast(first, tl.int64) * stride
    pointer = base + row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointer, mask=(first + row < count)[:, None], other=0.0)


@jit()
def store_rows(
    base, stride, first, count, rows, ROWS: tl.constexpr, D: tl.constexpr
):
    """Writes rows [ROWS, D] from ``first`` on, none from ``count`` on."""
    row = tl.arange(0, ROWS)
    base += tl.cast(first, tl.int64) * stride
    pointer = base + row[:, None] * stride + tl.arange(0, D)[None, :]
    rows = rows.to(base.dtype.element_ty)
    tl.store(pointer, rows, mask=(first + row < count)[:, None])


@jit()
def half_norms(x):
    """``|x|^2 / 2`` of rows, [rows], in float32."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1) / 2


@jit()
def exponents(x, direction):
    """[rows, features]; errors in here grow in exp, hence three products."""
    return tl.dot(
        x.to(direction.dtype), tl.trans(direction), input_precision="tf32x3"
    )


@jit()
def operand(x, direction):
    """``x`` as it is multiplied: bfloat16, or rounded to TensorFloat-32.

    Hopper's tensor cores cut the mantissa off after ten bits instead, which
    makes the error four times as large and biases it.
    """
    if direction.dtype == tl.bfloat16:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
        rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # the largest nan would become zero
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x


@jit()
def product(a, b, start, direction):
    """``start + a @ b`` in the precision of the directions."""
    return tl.dot(
        operand(a, direction),
        operand(b, direction),
        start,
        input_precision="tf32",
    )


@jit()
def visible_rows(hidden, first, frames, ROWS: tl.constexpr):
    """Which keys exist and are not padding, [ROWS]."""
    row = first + tl.arange(0, ROWS)
    visible = row < frames
    if hidden is not None:
        visible = visible & (tl.load(hidden + row, mask=visible, other=1) == 0)
    return visible


@jit(do_not_specialize=["frames", "frames_per_split"])
def accumulate_keys(
    key,
    value,
    hidden,
    projection,
    state,
    weight,
    bound,
    key_batch,
    key_head,
    key_frame,
    value_batch,
    value_head,
    value_frame,
    heads,
    frames,
    frames_per_split,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial sums over the keys of one split, for a block of features.

    Writes ``state`` [sequences, splits, FEATURES, VALUE_D], ``weight`` and
    ``bound`` [sequences, splits, FEATURES]: sums of ``exp(exponent - bound)``.
    """
    blocks: tl.constexpr = FEATURES // COLUMNS
    feature = tl.program_id(0) % blocks * COLUMNS
    split = tl.program_id(0) // blocks
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    if hidden is not None:
        hidden += batch * frames
    direction = load_rows(projection, D, feature, FEATURES, COLUMNS, D)
    # finite, so that a split without visible keys has no inf - inf
    largest = tl.full([COLUMNS], -3.0e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    summed = tl.zeros([COLUMNS, VALUE_D], tl.float32)
    begin = split * frames_per_split
    for first in range(
        begin, tl.minimum(begin + frames_per_split, frames), ROWS
    ):
        k = load_rows(key, key_frame, first, frames, ROWS, D)
        v = load_rows(value, value_frame, first, frames, ROWS, VALUE_D)
        exponent = exponents(k, direction) - half_norms(k)[:, None]
        visible = visible_rows(hidden, first, frames, ROWS)
        exponent = tl.where(visible[:, None], exponent, float("-inf"))
        larger = tl.maximum(largest, tl.max(exponent, 0))
        shrink = tl.exp(largest - larger)
        # rounded before both sums: equal values then have that value as mean
        phi = operand(tl.exp(exponent - larger[None, :]), direction)
        total = total * shrink + tl.sum(phi.to(tl.float32), 0)
        summed = product(tl.trans(phi), v, summed * shrink[:, None], direction)
        largest = larger
    place = (sequence * (tl.num_programs(0) // blocks) + split) * FEATURES
    column = place + feature + tl.arange(0, COLUMNS)
    tl.store(bound + column, largest)
    tl.store(weight + column, total)
    state += place * VALUE_D
    store_rows(state, VALUE_D, feature, FEATURES, summed, COLUMNS, VALUE_D)


@jit(do_not_specialize=["frames"])
def attend(
    query,
    projection,
    state,
    weight,
    centre,
    output,
    log_sum,
    query_batch,
    query_head,
    query_frame,
    output_batch,
    output_head,
    output_frame,
    heads,
    frames,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Output of a block of queries, and the logarithms of their weights."""
    first = tl.program_id(0) * ROWS
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    query += batch * query_batch + head * query_head
    output += batch * output_batch + head * output_head
    state += sequence * FEATURES * VALUE_D
    weight += sequence * FEATURES
    q = load_rows(query, query_frame, first, frames, ROWS, D)
    largest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_D], tl.float32)
    for feature in range(0, FEATURES, COLUMNS):
        direction = load_rows(projection, D, feature, FEATURES, COLUMNS, D)
        s = load_rows(state, VALUE_D, feature, FEATURES, COLUMNS, VALUE_D)
        z = tl.load(weight + feature + tl.arange(0, COLUMNS))
        exponent = exponents(q, direction)
        larger = tl.maximum(largest, tl.max(exponent, 1))
        shrink = tl.exp(largest - larger)
        phi = tl.exp(exponent - larger[:, None])
        total = total * shrink + tl.sum(phi * z[None, :], 1)
        mixed = product(phi, s, mixed * shrink[:, None], direction)
        largest = larger
    # as in the plain form: no key in sight gives zero and no gradient
    seen = (total >= 1.1754944e-38) | (total != total)  # NaN stays NaN
    total = tl.where(seen, total, 1.0)
    mean = tl.load(centre + sequence * VALUE_D + tl.arange(0, VALUE_D))
    mixed = tl.where(seen[:, None], mixed / total[:, None] + mean[None, :], 0.0)
    store_rows(output, output_frame, first, frames, mixed, ROWS, VALUE_D)
    row = first + tl.arange(0, ROWS)
    log_total = tl.where(seen, largest + tl.log(total), float("inf"))
    tl.store(log_sum + sequence * frames + row, log_total, mask=row < frames)
