"""The Triton kernels of both recurrences, and of their first-order backward: one skeleton twice.

    scan_kernel   one program for a tile of batch rows and a group: all of W on chip, all time steps
    step_kernel   one program for a tile of units, a tile of rows and a group: one time step

Both are a state times a stationary matrix and then `_finish`, which alone knows FORWARD, LAYER,
BACKWARD and LINEAR apart. Tiles are (units, rows), the hidden units as a product's M: that is
what the tensor cores' shapes suit, for a batch tile may be as narrow as 8.

Letters as in reference.py. Memory: rows (N, G*H) with `row_stride` elements from row to row; states
(G, B, H); a weight's element for (unit n, input k) is n * stride_n + k * stride_k from its group's,
so a transposed matrix is a matter of strides; `steps_table` (2, T) int64 has each step's batch size
and first row, or is None for a plain batch.
"""

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)  # h = f(input + W h)
LAYER = tl.constexpr(1)  # h = f(W_ih input + b_ih + b_hh + W h)
BACKWARD = tl.constexpr(2)  # v = f'(aux) * (input + W v), entry joins at a row's first step
LINEAR = tl.constexpr(3)  # s = input + aux * (W s)

# The interpreter multiplies bfloat16's bit patterns, and rounds to it wrongly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---- f, and f' from f's output ----


@triton.jit
def _tanh(a):
    """A quotient of polynomials near 0, where 1 - exp would cancel, and of exponentials elsewhere:
    within a few ulp of float32 (and of float64), at one division."""
    e = tl.exp(-2 * tl.abs(a))
    square = a * a
    near = square < 0.1225
    if a.dtype == tl.float64:
        odd = 135135.0 + square * (17325.0 + square * (378.0 + square))
        even = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    else:
        odd = 105.0 + square * 10.0
        even = 105.0 + square * (45.0 + square)
    sign = tl.where(a < 0, -1.0, 1.0).to(a.dtype)
    return tl.where(near, a * odd, sign * (1 - e)) / tl.where(near, even, 1 + e)


@triton.jit
def _approximate_tanh(a):
    """One instruction, off by 2^-11 at most: an eighth of what a bfloat16 is rounded by."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    if ACTIVATION == "tanh":
        if APPROXIMATE:
            return _approximate_tanh(a)
        else:
            return _tanh(a)
    elif ACTIVATION == "relu":
        return tl.where(a <= 0, 0.0, a)  # a NaN stays one
    elif ACTIVATION == "sigmoid":
        return 1 / (1 + tl.exp(-a))
    elif ACTIVATION == "softplus":
        # log1p(e) as log(u) * e / (u - 1), u = 1 + e: the rounding of u cancels.
        e = tl.exp(-tl.abs(a))
        u = 1 + e
        return tl.where(a <= 0, 0.0, a) + tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return a


@triton.jit
def _derivative(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        return 1 - h * h
    elif ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, 1.0)  # a NaN lets its gradient through
    elif ACTIVATION == "sigmoid":
        return h * (1 - h)
    elif ACTIVATION == "softplus":
        # -expm1(-h) without its cancellation
        return _tanh(h / 2) * (1 + tl.exp(-h))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return 1.0


# ---- what the two kernels share ----


@triton.jit
def _group_offset(group, stride_g, ALIGNED: tl.constexpr):
    """Where a group's weight is. stride_g depends on where the weights happen to lie, so no kernel
    is compiled for one; but of ALIGNED ones 16 bytes may be read at once."""
    offset = group * stride_g
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def _to(a, dtype: tl.constexpr):
    """a, of the compute dtype, rounded to `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = a.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        a = tl.where(a != a, a, rounded.to(tl.float32, bitcast=True))
    return a.to(dtype)


@triton.jit
def _dot(weight, state, acc, PRECISION: tl.constexpr):
    if INTERPRETED and weight.dtype == tl.bfloat16:
        return acc + tl.dot(weight.to(tl.float32), state.to(tl.float32))
    else:
        return tl.dot(weight, state, acc=acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _finish(acc, x, aux, MODE: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The next state. acc: W's product, on top of all that is added to it (LINEAR: of nothing)."""
    if MODE == LINEAR:
        return x.to(acc.dtype) + aux.to(acc.dtype) * acc
    elif MODE == BACKWARD:
        return acc * _derivative(aux.to(acc.dtype), ACTIVATION)
    else:
        return _activate(acc, ACTIVATION, APPROXIMATE)


@triton.jit
def _is_reversed(reverse, group):
    """The group's bit; where all groups go one way, all bits are alike."""
    return ((reverse >> tl.minimum(group, 31)) & 1) != 0


@triton.jit
def _step(i, steps_table, steps, batch, backwards):
    """Batch size and first row of the i-th step in scan order; of one outside: 0, and any row."""
    inside = (i >= 0) & (i < steps)
    t = tl.where(backwards, steps - 1 - i, i)
    if steps_table is None:
        size, first = tl.where(inside, batch, 0), t.to(tl.int64) * batch
    else:
        size = tl.load(steps_table + t, mask=inside, other=0).to(tl.int32)
        first = tl.load(steps_table + steps + t, mask=inside, other=0)
    return size, first


# ---- all steps in one program ----


@triton.jit
def _fetch(
    i, input, aux, steps_table, steps, batch, backwards, row_stride, features,
    rows, tile, input_tile, known, MODE: tl.constexpr,
):  # fmt: skip
    """Of the i-th step: its batch size, where its tile begins, and the tile of input and aux, asked
    for long before they are needed."""
    size, first = _step(i, steps_table, steps, batch, backwards)
    start = first * row_stride
    here = (rows < size)[None, :]
    x, a = 0.0, 0.0
    if MODE == LAYER:
        x = tl.load(input + first * features + input_tile, mask=here & (input_tile >= 0), other=0.0)
    elif input is not None:
        x = tl.load(input + start + tile, mask=here & known, other=0.0)
    if aux is not None:
        a = tl.load(aux + start + tile, mask=here & known, other=0.0)
    return size, start, x, a


@triton.jit
def _advance(
    state, fetched, previous, w, w_ih, bias, input, entry, output, batch, rows, tile, known,
    at_state, MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr, EVEN_H: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The next state, which is written to output, and the step's batch size."""
    COMPUTE: tl.constexpr = tl.float64 if w.dtype == tl.float64 else tl.float32
    size, start, x, a = fetched
    here = (rows < (size if PACKED else batch))[None, :]
    if MODE == LAYER:
        # Of a sum of w_ih * x the compiler would make a product in TF32, whatever PRECISION is.
        acc = _dot(w_ih, x, bias, PRECISION)
    elif MODE == LINEAR or input is None:
        acc = tl.zeros(state.shape, COMPUTE)
    else:
        acc = x.to(COMPUTE)
    if entry is not None:
        if size > previous:
            enters = known & here & (rows >= previous)[None, :]
            acc += tl.load(entry + at_state, mask=enters, other=0.0).to(COMPUTE)
    acc = _dot(w, state, acc, PRECISION)
    new = _to(_finish(acc, x, a, MODE, ACTIVATION, APPROXIMATE), w.dtype)
    if not EVEN_H:
        # f(0) may not be 0, and 0 * inf is not: what is no unit stays out of the next product.
        new = tl.where(known, new, 0.0)
    tl.store(output + start + tile, new, mask=here & known)
    if PACKED:
        new = tl.where(here, new, state)
    return new, size


@triton.jit(do_not_specialize=[
    "steps", "batch", "reverse", "features",
    "stride_g", "stride_g_ih", "stride_g_bias_ih", "stride_g_bias_hh",
])  # fmt: skip
def scan_kernel(
    input, aux, initial, entry, output, last, weight, steps_table,
    steps, batch, hidden, reverse, row_stride, stride_n, stride_k, stride_g: tl.int64,
    weight_ih, bias_ih, bias_hh, features,
    stride_g_ih: tl.int64, stride_g_bias_ih: tl.int64, stride_g_bias_hh: tl.int64,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr, ALIGNED: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_B rows of a group; W and the state stay on chip."""
    group = tl.program_id(1)
    backwards = _is_reversed(reverse, group)
    group = group.to(tl.int64)
    DTYPE: tl.constexpr = weight.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    PACKED: tl.constexpr = steps_table is not None

    units = tl.arange(0, BLOCK_H)
    is_unit = units < (BLOCK_H if EVEN_H else hidden)
    known = is_unit[:, None]
    in_tile = tl.arange(0, BLOCK_B)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = first_row.to(tl.int32) + in_tile
    tile = in_tile[None, :] * row_stride + units[:, None]
    weight += _group_offset(group, stride_g, ALIGNED)
    w = tl.load(
        weight + units[:, None] * stride_n + units[None, :] * stride_k,
        mask=known & is_unit[None, :],
        other=0.0,
    )
    # From here on each of these points to the tile's corner in the first step.
    corner = first_row * row_stride + group * hidden
    output += corner
    if aux is not None:
        aux += corner
    input_tile, w_ih, bias = tile, 0.0, 0.0
    if MODE == LAYER:
        feature = tl.arange(0, BLOCK_I)
        w_ih = tl.load(
            weight_ih + group * stride_g_ih + units[:, None] * features + feature[None, :],
            mask=known & (feature < features)[None, :],
            other=0.0,
        )
        bias = tl.zeros([BLOCK_H], COMPUTE)
        if bias_ih is not None:
            bias += tl.load(bias_ih + group * stride_g_bias_ih + units, mask=is_unit, other=0.0)
            bias += tl.load(bias_hh + group * stride_g_bias_hh + units, mask=is_unit, other=0.0)
        bias = tl.broadcast_to(bias[:, None], [BLOCK_H, BLOCK_B])
        input += first_row * features
        input_tile = tl.where(
            feature[:, None] < features, in_tile[None, :] * features + feature[:, None], -1
        )
    elif input is not None:
        input += corner
    at_state = (group * batch + rows[None, :]) * hidden + units[:, None]
    is_state = known & (rows < batch)[None, :]
    if initial is None:
        state = tl.zeros([BLOCK_H, BLOCK_B], DTYPE)
    else:
        state = tl.load(initial + at_state, mask=is_state, other=0.0)

    # The steps that make no whole round come first, so that no round needs to ask.
    previous, rest = 0, steps % UNROLL
    for i in range(rest):
        fetched = _fetch(
            i, input, aux, steps_table, steps, batch, backwards, row_stride, features,
            rows, tile, input_tile, known, MODE,
        )  # fmt: skip
        state, previous = _advance(
            state, fetched, previous, w, w_ih, bias, input, entry, output, batch, rows, tile, known,
            at_state, MODE, ACTIVATION, PRECISION, APPROXIMATE, EVEN_H, PACKED,
        )  # fmt: skip
    ahead = ()
    for j in tl.static_range(UNROLL):
        fetched = _fetch(
            rest + j, input, aux, steps_table, steps, batch, backwards, row_stride, features,
            rows, tile, input_tile, known, MODE,
        )  # fmt: skip
        ahead = ahead + (fetched,)
    for i in range(rest, steps, UNROLL):
        now, ahead = ahead, ()
        for j in tl.static_range(UNROLL):
            fetched = _fetch(
                i + UNROLL + j, input, aux, steps_table, steps, batch, backwards, row_stride,
                features, rows, tile, input_tile, known, MODE,
            )  # fmt: skip
            ahead = ahead + (fetched,)
            state, previous = _advance(
                state, now[j], previous, w, w_ih, bias, input, entry, output, batch, rows, tile,
                known, at_state, MODE, ACTIVATION, PRECISION, APPROXIMATE, EVEN_H, PACKED,
            )  # fmt: skip
    if last is not None:
        tl.store(last + at_state, state, mask=is_state)


# ---- one step ----


@triton.jit(do_not_specialize=["i", "steps", "batch", "reverse", "stride_g"])
def step_kernel(
    i, input, aux, state, sums, entry, output, next_state, weight, steps_table,
    steps, batch, hidden, reverse, row_stride, stride_n, stride_k, stride_g: tl.int64,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr, ALIGNED: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N units of BLOCK_B rows of a group in the i-th step, from `state` to `next_state`, to
    which the rows that take no part are copied. sums: the products of state and weight, like a
    state, where they have been made already."""
    group = tl.program_id(2)
    backwards = _is_reversed(reverse, group)
    group = group.to(tl.int64)
    DTYPE: tl.constexpr = weight.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32

    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_unit = units < hidden
    known = (is_unit | EVEN_H)[:, None]
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    size, first = _step(i, steps_table, steps, batch, backwards)
    previous, _ = _step(i - 1, steps_table, steps, batch, backwards)
    here = known & (rows < size)[None, :]
    at = (first + rows[None, :]) * row_stride + group * hidden + units[:, None]
    x, a = 0.0, 0.0
    if input is not None:
        x = tl.load(input + at, mask=here, other=0.0)
    if aux is not None:
        a = tl.load(aux + at, mask=here, other=0.0)

    acc = tl.zeros([BLOCK_N, BLOCK_B], COMPUTE)
    row_of_state = (group * batch + rows) * hidden
    at_state = row_of_state[None, :] + units[:, None]
    is_state = known & (rows < batch)[None, :]
    if sums is not None:
        acc = tl.load(sums + at_state, mask=is_state, other=0.0)
    else:
        row_of_weight = _group_offset(group, stride_g, ALIGNED) + units.to(tl.int64) * stride_n
        for k in range(0, hidden, BLOCK_K):
            inputs = k + tl.arange(0, BLOCK_K)
            is_input = (inputs < hidden) | EVEN_H
            w = tl.load(
                weight + row_of_weight[:, None] + inputs[None, :].to(tl.int64) * stride_k,
                mask=known & is_input[None, :],
                other=0.0,
            )
            s = tl.load(
                state + row_of_state[None, :] + inputs[:, None],
                mask=is_input[:, None] & (rows < batch)[None, :],
                other=0.0,
            )
            acc = _dot(w, s, acc, PRECISION)

    if MODE != LINEAR and input is not None:
        acc += x.to(COMPUTE)
    if entry is not None:
        if size > previous:
            enters = here & (rows >= previous)[None, :]
            acc += tl.load(entry + at_state, mask=enters, other=0.0).to(COMPUTE)
    new = _to(_finish(acc, x, a, MODE, ACTIVATION, APPROXIMATE), DTYPE)
    tl.store(output + at, new, mask=here)
    if steps_table is not None:
        new = tl.where(here, new, tl.load(state + at_state, mask=is_state, other=0.0))
    tl.store(next_state + at_state, new, mask=is_state)
