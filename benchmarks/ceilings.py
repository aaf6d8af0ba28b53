"""What this machine can do at most: the ceilings that the cost model divides by.

    python benchmarks/ceilings.py [--repeats=7]

Matrix products in float32 and bfloat16, square and in the shapes of the training softmax (rows of a chunk x hidden size x
items of ml-1m), a copy of memory, exponentials, and dropout masks. Medians; prints Markdown.
"""

import sys
import time
from statistics import median

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.model.quick_layers import kept
from recbole_dpr.run import machine, versions

_SQUARE, _COPIED, _NUMBERS = 4096, 2**26, 2**24  # rows; floats (256 MiB), larger than any cache; floats
_ROWS, _HIDDEN, _ITEMS = 6400, 64, 3668
_CHUNK = 512  # rows of scores that stay in the cache


def measured(repeats=7):
    """The ceilings: dict of name -> (operations per second, unit).

    Names end in the dtype for matrix products; "FLOP" counts a multiplication and an addition as two.
    """
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        shapes = {"square": (_SQUARE, _SQUARE, _SQUARE), "scores": (_ROWS, _HIDDEN, _ITEMS), "gradient": (_ROWS, _ITEMS, _HIDDEN)}
        for shape, (rows, inner, columns) in shapes.items():
            a, b, out = (torch.randn(size).to(dtype) for size in ((rows, inner), (inner, columns), (rows, columns)))
            result[f"product, {shape}, {name}"] = 2 * rows * inner * columns / _seconds(lambda: torch.mm(a, b, out=out), repeats), "FLOP/s"
    source = torch.zeros(_COPIED)
    target = torch.zeros(_COPIED)
    result["copy"] = 2 * 4 * _COPIED / _seconds(lambda: target.copy_(source), repeats), "byte/s"
    scores, out = torch.randn(_CHUNK, _ITEMS), torch.empty(_CHUNK, _ITEMS)
    result["exp, in cache"] = scores.numel() / _seconds(lambda: torch.exp(scores, out=out), 10 * repeats), "number/s"
    source = torch.randn(_NUMBERS)
    result["exp, in memory"] = _NUMBERS / _seconds(lambda: torch.exp(source, out=target[:_NUMBERS]), repeats), "number/s"
    result["dropout"] = _NUMBERS / _seconds(lambda: kept((_NUMBERS,), 0.2), repeats), "number/s"
    return result


def _seconds(work, repeats):
    """Median seconds of one call, after a first one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return median(found)


def main(repeats=7):
    used = versions()
    print(f"{machine()}; torch {used['torch']}, Python {used['python']}\n")
    rows = [[name, f"{value / 1e9:,.2f}", f"G{unit}"] for name, (value, unit) in measured(repeats).items()]
    print(tabulate(rows, headers=["ceiling", "median", "unit"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(**parse_settings(sys.argv[1:]))
