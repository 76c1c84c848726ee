"""Triton kernels of FAVOR+ attention, backward; see ``favor_kernels``.

Weights of features are made anew. ``log_sum`` [sequences, frames] holds the
logarithms of the queries' sums of weights, infinite where no key is visible.
"""

from trackformer_sb.nnet.favor_kernels import (
    exponents,
    half_norms,
    jit,
    load_rows,
    operand,
    product,
    store_rows,
    tl,
    visible_rows,
)


@jit(do_not_specialize=["frames"])
def query_gradient(
    query,
    projection,
    state,
    weight,
    grad_output,
    log_sum,
    grad_query,
    delta,
    query_batch,
    query_head,
    query_frame,
    grad_output_batch,
    grad_output_head,
    grad_output_frame,
    grad_query_batch,
    grad_query_head,
    grad_query_frame,
    heads,
    frames,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient for a block of queries; ``delta`` is ``g . (output - centre)``.

    ``state`` is that of the values less ``centre``. With p the weights of a
    query over their sum, ``d exponent_f = p_f (g . S_f - delta z_f)``.
    """
    first = tl.program_id(0) * ROWS
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    query += batch * query_batch + head * query_head
    grad_output += batch * grad_output_batch + head * grad_output_head
    grad_query += batch * grad_query_batch + head * grad_query_head
    state += sequence * FEATURES * VALUE_D
    weight += sequence * FEATURES
    row = first + tl.arange(0, ROWS)
    inside = row < frames
    log_sum += sequence * frames + row
    log_total = tl.load(log_sum, mask=inside, other=float("inf"))
    q = load_rows(query, query_frame, first, frames, ROWS, D)
    g = load_rows(grad_output, grad_output_frame, first, frames, ROWS, VALUE_D)
    gradient = tl.zeros([ROWS, D], tl.float32)
    # delta is known after the loop only: from the rounded output it would
    # carry an error relative to the centre
    away = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, D], tl.float32)
    for feature in range(0, FEATURES, COLUMNS):
        direction = load_rows(projection, D, feature, FEATURES, COLUMNS, D)
        s = load_rows(state, VALUE_D, feature, FEATURES, COLUMNS, VALUE_D)
        z = tl.load(weight + feature + tl.arange(0, COLUMNS))
        p = tl.exp(exponents(q, direction) - log_total[:, None])
        change = p * product(g, tl.trans(s), None, direction)
        away += tl.sum(change, 1)
        gradient = product(change, direction, gradient, direction)
        mean = product(p * z[None, :], direction, mean, direction)
    gradient -= away[:, None] * mean
    tl.store(delta + sequence * frames + row, away, mask=inside)
    store_rows(grad_query, grad_query_frame, first, frames, gradient, ROWS, D)


@jit(do_not_specialize=["frames", "frames_per_split"])
def state_gradient(
    query,
    grad_output,
    projection,
    log_sum,
    delta,
    grad_state,
    grad_weight,
    query_batch,
    query_head,
    query_frame,
    grad_output_batch,
    grad_output_head,
    grad_output_frame,
    heads,
    frames,
    frames_per_split,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial sums over the queries of one split, laid out as the state's."""
    blocks: tl.constexpr = FEATURES // COLUMNS
    feature = tl.program_id(0) % blocks * COLUMNS
    split = tl.program_id(0) // blocks
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    query += batch * query_batch + head * query_head
    grad_output += batch * grad_output_batch + head * grad_output_head
    log_sum += sequence * frames
    delta += sequence * frames
    direction = load_rows(projection, D, feature, FEATURES, COLUMNS, D)
    total = tl.zeros([COLUMNS], tl.float32)
    summed = tl.zeros([COLUMNS, VALUE_D], tl.float32)
    begin = split * frames_per_split
    for first in range(
        begin, tl.minimum(begin + frames_per_split, frames), ROWS
    ):
        q = load_rows(query, query_frame, first, frames, ROWS, D)
        g = load_rows(
            grad_output, grad_output_frame, first, frames, ROWS, VALUE_D
        )
        row = first + tl.arange(0, ROWS)
        inside = row < frames
        log_total = tl.load(log_sum + row, mask=inside, other=float("inf"))
        away = tl.load(delta + row, mask=inside, other=0.0)
        p = tl.exp(exponents(q, direction) - log_total[:, None])
        p = operand(p, direction)
        total -= tl.sum(p.to(tl.float32) * away[:, None], 0)
        summed = product(tl.trans(p), g, summed, direction)
    place = (sequence * (tl.num_programs(0) // blocks) + split) * FEATURES
    column = place + feature + tl.arange(0, COLUMNS)
    tl.store(grad_weight + column, total)
    grad_state += place * VALUE_D
    store_rows(grad_state, VALUE_D, feature, FEATURES, summed, COLUMNS, VALUE_D)


@jit(do_not_specialize=["frames"])
def key_value_gradient(
    key,
    value,
    hidden,
    projection,
    grad_state,
    grad_weight,
    centre,
    bound,
    grad_key,
    grad_value,
    key_batch,
    key_head,
    key_frame,
    value_batch,
    value_head,
    value_frame,
    grad_key_batch,
    grad_key_head,
    grad_key_frame,
    grad_value_batch,
    grad_value_head,
    grad_value_frame,
    heads,
    frames,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients for a block of keys and their values.

    ``d exponent_f = phi_f ((v - centre) . dS_f + dz_f)``, ``bound`` [sequences]
    being the largest exponent of all keys.
    """
    first = tl.program_id(0) * ROWS
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    grad_key += batch * grad_key_batch + head * grad_key_head
    grad_value += batch * grad_value_batch + head * grad_value_head
    grad_state += sequence * FEATURES * VALUE_D
    grad_weight += sequence * FEATURES
    if hidden is not None:
        hidden += batch * frames
    visible = visible_rows(hidden, first, frames, ROWS)
    k = load_rows(key, key_frame, first, frames, ROWS, D)
    offset = half_norms(k) + tl.load(bound + sequence)
    mean = tl.load(centre + sequence * VALUE_D + tl.arange(0, VALUE_D))
    v = load_rows(value, value_frame, first, frames, ROWS, VALUE_D)
    v = v.to(tl.float32) - mean[None, :]
    for_key = tl.zeros([ROWS, D], tl.float32)
    for_value = tl.zeros([ROWS, VALUE_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for feature in range(0, FEATURES, COLUMNS):
        direction = load_rows(projection, D, feature, FEATURES, COLUMNS, D)
        ds = load_rows(grad_state, VALUE_D, feature, FEATURES, COLUMNS, VALUE_D)
        dz = tl.load(grad_weight + feature + tl.arange(0, COLUMNS))
        exponent = exponents(k, direction) - offset[:, None]
        # before exp: a hidden key may lie above the bound
        exponent = tl.where(visible[:, None], exponent, float("-inf"))
        phi = tl.exp(exponent)
        for_value = product(phi, ds, for_value, direction)
        change = product(v, tl.trans(ds), None, direction)
        change = phi * (change + dz[None, :])
        total += tl.sum(change, 1)
        for_key = product(change, direction, for_key, direction)
    for_key -= total[:, None] * k.to(tl.float32)
    store_rows(grad_key, grad_key_frame, first, frames, for_key, ROWS, D)
    store_rows(
        grad_value, grad_value_frame, first, frames, for_value, ROWS, VALUE_D
    )
