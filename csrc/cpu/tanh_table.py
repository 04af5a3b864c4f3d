"""Writes tanh_table.h: python csrc/cpu/tanh_table.py

tanh a = c0 + t (c1 + t (c2 + ...)), t = a - middle, on each of the intervals that begin where a
float's exponent or first two bits of mantissa change, from 1/16 to where tanh rounds to 1, and on
the one below them. A middle is the float about there whose tanh is nearest to a float, so that c0
is exact to 1/128 of its last bit (the idea is Gal and Bachelis', "An Accurate Elementary
Mathematical Library for the IEEE Floating Point Standard", ACM TOMS 1991). The other coefficients
are fitted one after another, each rounded before the next, by least squares of the relative error
at Chebyshev nodes.
"""

import re
from pathlib import Path

import torch

DEGREE, ENTRIES, SHIFT = 5, 32, 21  # the shift leaves the exponent and two bits
LEAST, SATURATION = 0.0625, 9.02
HEADER = """\
// Written by tanh_table.py, where it is explained.
#pragma once
#include <cstdint>

namespace rnnkern::cpu::RNNKERN_ISA {{

// Row 0: the middles of intervals; row k: coefficients k - 1. An interval's place is that of its
// floats' bits >> {shift}, modulo {entries}; those below 1/16 share the place before.
constexpr int kTanhShift = {shift};
constexpr int32_t kTanhLeast = {least:#x}, kTanhMost = {most:#x};
// clang-format off
alignas(64) constexpr float kTanhTable[{rows}][{entries}] = {{
{table}}};
// clang-format on

}}  // namespace rnnkern::cpu::RNNKERN_ISA
"""


def bits(x: float) -> int:
    return torch.tensor(x).view(torch.int32).item()


def middle(low: float, high: float) -> tuple[float, float]:
    """A float, and its tanh's."""
    floats = (torch.arange(-3000, 3000).int() + bits((low + high) / 2)).view(torch.float32)
    exact = floats.double().tanh()
    error = (exact - exact.float().double()).abs() / exact
    near = (error < error.min().clamp(min=2.0**-31)).nonzero().flatten()
    best = near[(near - 3000).abs().argmin()] if len(near) else error.argmin()
    return floats[best].item(), exact[best].float().item()


def coefficients(low: float, high: float) -> list[float]:
    """The middle and c0, c1, ..."""
    nodes = torch.cos(torch.pi * (torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    exact = x.tanh()
    made = [*middle(low, high)] if low else [0.0, 0.0, 1.0]
    t = x - made[0]
    for k in range(len(made) - 1, DEGREE + 1):
        rest = exact - sum(c * t**i for i, c in enumerate(made[1:]))
        powers = torch.stack([t**i / exact for i in range(k, DEGREE + 1)], 1)
        scale = powers.norm(dim=0)
        fit = torch.linalg.lstsq(powers / scale, (rest / exact)[:, None]).solution[:, 0] / scale
        made.append(fit[0].float().item())
    return made


def main() -> None:
    first, last = bits(LEAST) >> SHIFT, bits(SATURATION) >> SHIFT
    starts = (torch.arange(first, last + 1).int() << SHIFT).view(torch.float32).tolist()
    edges = [0.0, *starts, SATURATION]
    table = torch.zeros(DEGREE + 2, ENTRIES)
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        table[:, (first - 1 + i) % ENTRIES] = torch.tensor(coefficients(low, high))
    rows = ""
    for row in table.tolist():
        numbers = [re.sub(r"\.?0*p", "p", x.hex()) + "f" for x in row]
        lines = [", ".join(numbers[i : i + 4]) for i in range(0, ENTRIES, 4)]
        rows += "  {" + ",\n   ".join(lines) + "},\n"
    values = {"shift": SHIFT, "entries": ENTRIES, "rows": DEGREE + 2, "table": rows}
    values |= {"least": (first - 1) << SHIFT, "most": last << SHIFT}
    Path(__file__).with_suffix(".h").write_text(HEADER.format(**values))


if __name__ == "__main__":
    main()
