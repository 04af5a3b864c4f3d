"""How exact the compiled kernels are: activations in ulps, and the rounding of half types.

Test names say "precision": test_scans.py runs them on every instruction set.
"""

import itertools

import mpmath
import pytest
import torch
from cases import Shape, make_inputs, needs_library, relative_error

from rnnkern import library, linear_scan, rnn_scan

pytestmark = needs_library
H = 64
INF, NAN = float("inf"), float("nan")
# Without a fused multiply-add, the residual that corrects the quotient is itself rounded.
TANH_ULPS = 2.2 if library.capability() == "default" else 2
# Where torch has no AVX-512, AMX is emulated, and torch's own products are of another kind than
# beside AMX.
SPLITS = library.capability() == "amx" and torch.backends.cpu.get_cpu_capability() == "AVX512"
BY_TABLE = library.loaded and library.capability() not in ("default", "avx2")  # in float32


def through_the_scan(x, nonlinearity):
    """f of every element of x: one step from a zero state under zero weights."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % H)).view(1, -1, H)
    h, _ = rnn_scan(rows, [x.new_zeros(H, H)], nonlinearity=nonlinearity, backend="cpu")
    return h.flatten()[: x.numel()]


def every_exponent(count=2**20):
    """About `count` finite floats, evenly over all bit patterns: both signs, subnormals too."""
    bits = torch.arange(-(2**31), 2**31, 2**32 // count - 3).to(torch.int32)
    x = bits.view(torch.float32)
    return x[x.isfinite()]


def worst_ulps(got, exact, dtype, underflow=0.0):
    """The largest |got - exact| in units of the last place of `exact` in dtype; exact is float64.

    An error up to `underflow` counts as none.
    """
    info = torch.finfo(dtype)
    exponent = exact.abs().clamp(min=info.tiny).frexp().exponent - 1
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    error = (got.double() - exact).abs()
    return (error / ulp)[error > underflow].max().item() if (error > underflow).any() else 0.0


@pytest.mark.parametrize(
    "nonlinearity, exact, ulps",
    [
        ("tanh", torch.tanh, 1 if BY_TABLE else TANH_ULPS),
        ("sigmoid", torch.sigmoid, 3),
        ("softplus", lambda a: a.clamp(min=0) + torch.log1p(torch.exp(-a.abs())), 2),
        ("relu", torch.relu, 0),
        ("identity", lambda a: a, 0),
    ],
)
def test_precision_of_float32(nonlinearity, exact, ulps):
    x = torch.cat(
        [every_exponent(), torch.linspace(-110, 110, 2**18), torch.linspace(-2, 2, 2**16)]
    )
    got = through_the_scan(x, nonlinearity)
    # Where sigmoid leaves the normal numbers, zero or the smallest of them will do.
    underflow = torch.finfo(torch.float32).tiny if nonlinearity == "sigmoid" else 0.0
    assert worst_ulps(got, exact(x.double()), torch.float32, underflow) <= ulps


@pytest.mark.parametrize(
    "nonlinearity, exact, ulps",
    [("tanh", mpmath.tanh, TANH_ULPS), ("sigmoid", lambda a: 1 / (1 + mpmath.exp(-a)), 3)],
)
def test_precision_of_float64(nonlinearity, exact, ulps):
    x = torch.cat(
        [
            torch.linspace(-25, 25, 1501, dtype=torch.float64),
            torch.linspace(-1, 1, 777, dtype=torch.float64),
            torch.logspace(-308, 2, 700, dtype=torch.float64),
            -torch.logspace(-20, 2, 300, dtype=torch.float64),
        ]
    )
    got = through_the_scan(x, nonlinearity)
    with mpmath.workdps(40):
        for a, h in zip(x.tolist(), got.tolist(), strict=True):
            right = exact(mpmath.mpf(a))
            ulp = max(mpmath.ldexp(1, mpmath.frexp(right)[1] - 53), mpmath.mpf(5e-324))
            assert abs(h - right) <= ulps * ulp, f"{nonlinearity}({a!r}) = {h!r}, not {right}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "nonlinearity, low, high",
    [("tanh", -1, 1), ("sigmoid", 0, 1), ("softplus", 0, INF), ("relu", 0, INF)],
)
def test_precision_at_the_ends(nonlinearity, low, high, dtype):
    x = torch.tensor([-INF, -torch.finfo(dtype).max, torch.finfo(dtype).max, INF, NAN], dtype=dtype)
    got = through_the_scan(x, nonlinearity)
    largest = torch.finfo(dtype).max if high == INF else high
    assert got[:4].tolist() == [low, low, largest, high] and got[4].isnan()


def test_precision_of_tanh_is_odd_and_monotonic():
    x = every_exponent().abs().sort().values
    got = through_the_scan(x, "tanh")
    assert torch.equal(through_the_scan(-x, "tanh"), -got)
    assert (got <= 1).all()
    # Within 2 ulps, a step may fall back by one; within 1, none does.
    back = 0 if BY_TABLE else 2 * torch.finfo(torch.float32).eps
    assert (got.diff() >= -back * got[1:]).all()


# ---- rounding to the half types ----

half_types = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
flushes = pytest.mark.skipif(
    library.capability() in ("avx512_bf16", "amx"),
    reason="products of bfloat16 take subnormals for zero; test_every_instruction_set goes without",
)
half_types_with_subnormals = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=flushes), torch.float16],
    ids=["bfloat16", "float16"],
)


def sums(a, b, dtype):
    """round(a + b) as linear_scan makes it, u + gain * (s0 W^T) with gain = W = 1, and as torch."""
    one = torch.ones(1, 1, dtype=dtype)
    u, s0 = a.view(1, -1, 1), b.view(1, -1, 1)
    got = linear_scan(u, torch.ones_like(u), [one], s0, backend="cpu").flatten()
    scan, _ = rnn_scan(u, [one], s0, nonlinearity="identity", backend="cpu")
    assert_same_bits(scan.flatten(), got)
    return got, (a.float() + b.float()).to(dtype)


def assert_same_bits(got, right):
    """Equal but for the sign of zero and a NaN's payload."""
    assert torch.equal(got.isnan(), right.isnan())
    wrong = ((got != right) & ~right.isnan()).nonzero().flatten()[:5]
    assert not len(wrong), f"{got[wrong].tolist()} is not {right[wrong].tolist()}"


@half_types
def test_precision_of_every_half(dtype):
    """All 65536 values pass through unchanged, NaN as NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got, right = sums(every, torch.zeros_like(every), dtype)
    assert_same_bits(got, right)
    assert_same_bits(got, every)
    assert_same_bits(through_the_scan(every.nan_to_num(), "identity"), every.nan_to_num())


@half_types_with_subnormals
def test_precision_of_rounding_random_sums(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for _ in range(8):
        other = every[torch.randperm(len(every))]
        # Any magnitudes, and such as differ by little, where the discarded bits decide.
        near = (every.float() * torch.randint(-256, 257, every.shape) / 512).to(dtype)
        for b in (other, near):
            assert_same_bits(*sums(every, b, dtype))


@half_types_with_subnormals
def test_precision_of_ties_subnormals_and_overflow(dtype):
    """Halfway cases go to the even neighbour; past the largest value's half step, to infinity."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    table = [
        (1, info.eps / 2, 1),  # a tie, down to even
        (1 + info.eps, info.eps / 2, 1 + 2 * info.eps),  # a tie, up to even
        (1, info.eps / 2 * (1 + info.eps), 1 + info.eps),  # just above the tie
        (-1, -info.eps / 2, -1),
        (info.max, info.max * info.eps / 8, info.max),
        (info.max, info.max * info.eps / 2, INF),
        (-info.max, -info.max, -INF),
        (smallest, smallest, 2 * smallest),
        (info.smallest_normal, -smallest, info.smallest_normal - smallest),
        (3 * smallest, -2 * smallest, smallest),
        (INF, -INF, NAN),
        (INF, 1, INF),
        (NAN, 1, NAN),
    ]
    a, b, right = torch.tensor(table, dtype=torch.float64).to(dtype).unbind(1)
    got, torchs = sums(a, b, dtype)
    assert_same_bits(got, right)
    assert_same_bits(torchs, right)


@half_types
def test_precision_of_products_below_the_smallest_half(dtype):
    """Products that only float32 holds are rounded once, into the subnormals."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    w = torch.arange(1, 256, dtype=torch.float64).div(256).to(dtype)
    s0 = torch.full((1, 255, 1), 64.0, dtype=dtype)
    gain = (w * 0 + smallest * 64).to(dtype).view(1, -1, 1)
    weight = torch.tensor([[1 / 64]], dtype=dtype)
    u = (smallest * torch.arange(255)).to(dtype).view(1, -1, 1)
    got = linear_scan(u, gain, [weight], s0 * w.view(1, -1, 1), backend="cpu").flatten()
    exact = u.float() + gain.float() * (s0 * w.view(1, -1, 1)).float() / 64
    assert_same_bits(got, exact.flatten().to(dtype))


@half_types
def test_precision_of_half_products(dtype):
    """Products of halves are summed in float32: 1 + 255 terms of eps/4 are not lost."""
    info = torch.finfo(dtype)
    state = torch.cat([torch.ones(1), torch.full((255,), info.eps / 4)]).to(dtype).view(1, 1, -1)
    weight = torch.zeros(256, 256, dtype=dtype)
    weight[:, :] = 1
    h, _ = rnn_scan(
        torch.zeros(1, 1, 256, dtype=dtype), [weight], state, nonlinearity="identity", backend="cpu"
    )
    assert (h == torch.tensor(1 + 255 * info.eps / 4).to(dtype)).all()


# ---- large products of float32, which AMX makes of bfloat16 ----

# csrc/cpu/runner.cpp: kSplitBatch; products.cpp: kSplitProduct. Of the second, products alone, of
# few rows.
LARGE = {"rows": Shape(37, 33, 258, 131), "panels": Shape(3, 100, 521, 515)}


def large_call(op, layout="plain", shape="rows"):
    """In numbers of all 24 bits, where make_inputs has such as bfloat16 holds."""
    call = make_inputs(op, layout, LARGE[shape], torch.float32)
    generator = torch.Generator().manual_seed(0)
    for t in (*call.tensors.values(), *call.grads):
        t *= 0.5 + torch.rand(t.shape, generator=generator)
    return call


def rms(a):
    return a.double().square().mean().sqrt().item()


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@pytest.mark.parametrize("op", ["layer-tanh", "layer-relu", "linear"])
def test_precision_of_large_products(op, layout, shape):
    """Errors against float64 like those of torch's own products; of what parts make, smaller."""
    call = large_call(op, layout, shape)
    right = call.to(torch.float64).results("reference")
    got, stock = call.results("cpu"), call.results("reference")
    for name, exact in right.items():
        error, usual = rms(got[name] - exact), rms(stock[name].double() - exact)
        # Of the plain rows all is made of parts, products and scans; else the scan or some product
        # is too small for that.
        all_of_it = (layout, shape) == ("plain", "rows") and "h0" not in name and "bias" not in name
        large = ("grad weight_hh", *(("grad x", "grad weight_ih") if shape == "panels" else ()))
        parts = SPLITS and op == "layer-tanh" and (all_of_it or name.startswith(large))
        most = 1 if parts else 2.5
        assert error <= most * usual, f"{name}: {error:.2e}, torch's {usual:.2e}"


@pytest.mark.parametrize("special", [NAN, INF, -INF, 3.4e38, -3.4e38])
@pytest.mark.parametrize(
    "nonlinearity, name, shape",
    [
        *itertools.product(("tanh", "relu"), ("x", "h0", "weight_ih.0", "weight_hh.0"), ("rows",)),
        *itertools.product(("tanh", "relu"), ("x", "weight_ih.0"), ("panels",)),
        *itertools.product(("tanh",), ("grad",), LARGE),
    ],
)
def test_precision_of_large_products_of_special_numbers(nonlinearity, name, shape, special):
    """What is infinite, or rounds to infinity in bfloat16, is multiplied as the reference does."""
    call = large_call(f"layer-{nonlinearity}", shape=shape)
    place = call.grads[0] if name == "grad" else call.tensors[name]
    place.view(-1)[place.numel() // 2 + 7] = special
    got, right = call.results("cpu"), call.results("reference")
    for key, expected in right.items():
        if nonlinearity == "relu" and key.startswith("grad"):
            continue  # torch's 0 is not 0 * infinity
        assert torch.equal(got[key].isnan(), expected.isnan()), key
        assert torch.equal(got[key].isinf(), expected.isinf()), key
        finite = expected.isfinite()
        if finite.any():
            assert relative_error(got[key][finite], expected[finite]) < 1e-4, key
