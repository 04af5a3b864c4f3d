"""rnnkern.quantize: time and accuracy of a layer in float32, in bfloat16 and with 8-bit weights.

    python bench/quantized.py [--threads N] [--rounds N] [--json FILE]

Forward without gradients, timed in turns. The error is that of the outputs, ||a - b|| / ||b||
against float32, for weights as they are initialised and inputs of unit variance.
"""

import copy
import statistics

import torch
from timing import arguments, finish, host, measure, ratio

import rnnkern
from rnnkern.parity import relative_error

SHAPES = [(16, 128, 64, 128), (1, 512, 512, 512), (64, 128, 512, 512), (1, 128, 2048, 2048)]


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    about = host(args)
    titles = ["(B, T, I, H)", "float32 us", "bfloat16 us", "x", "error", "8-bit us", "x", "error"]
    print(f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|")
    rows = []
    for b, t, i, h in SHAPES:
        torch.manual_seed(0)
        layer = rnnkern.RNN(i, h)
        half, bytes_ = copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer)
        rnnkern.quantize(bytes_)
        x = torch.randn(t, b, i)
        ways = {"float32": (layer, x), "bfloat16": (half, x.bfloat16()), "8-bit": (bytes_, x)}
        with torch.no_grad():
            right = layer(x)[0]
            errors = {way: relative_error(m(y)[0], right) for way, (m, y) in ways.items()}
            if not max(errors.values()) < 0.1:
                raise AssertionError(f"results differ: {errors}: not timed")
            calls = [lambda m=m, y=y: m(y) for m, y in ways.values()]
            times = dict(zip(ways, measure(calls, args.rounds), strict=True))
        row, cells = {"shape": (b, t, i, h)}, [str((b, t, i, h))]
        for way, of in times.items():
            us, faster = statistics.median(of) * 1e6, ratio(times["float32"], of)
            row[way] = {"us": us, "ratio": faster, "error": errors[way]}
            cells += [f"{us:.0f}"] + (
                [] if way == "float32" else [f"{faster:.2f}", f"{errors[way]:.1e}"]
            )
        rows.append(row)
        print(f"| {' | '.join(cells)} |", flush=True)
    finish(args, about, rows)


if __name__ == "__main__":
    main()
