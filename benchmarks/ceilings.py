"""What this machine can do at most: the ceilings that the cost model divides by.

    python benchmarks/ceilings.py [--repeats=7]

Matrix products in float32 and bfloat16, square and in the shapes of the training softmax (rows of a chunk x hidden size x
items of ml-1m), a copy of memory, softmax over a chunk, whose exponentials are the quickest of torch, and the dropout masks of
a batch. The quickest of some repeats, whatever else the machine does; prints Markdown.
"""

import sys
import time

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.model.quick_layers import kept
from recbole_dpr.run import machine, versions

_SQUARE, _COPIED = 2048, 2**26  # rows; floats (256 MiB), larger than any cache
_CHUNK, _HIDDEN, _ITEMS = 512, 64, 3668  # rows of scores that stay in the cache
_POSITIONS = 6400  # of a batch


def measured(repeats=7):
    """The ceilings: dict of name -> (operations per second, unit).

    Names end in the dtype for matrix products; "FLOP" counts a multiplication and an addition as two.
    """
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        shapes = {"square": (_SQUARE, _SQUARE, _SQUARE), "scores": (_CHUNK, _HIDDEN, _ITEMS), "gradient": (_CHUNK, _ITEMS, _HIDDEN)}
        for shape, (rows, inner, columns) in shapes.items():
            a, b, out = (torch.randn(size).to(dtype) for size in ((rows, inner), (inner, columns), (rows, columns)))
            result[f"product, {shape}, {name}"] = 2 * rows * inner * columns / _seconds(lambda: torch.mm(a, b, out=out), 5 * repeats), "FLOP/s"
        scores = torch.randn(_CHUNK, _ITEMS).to(dtype)
        result[f"softmax, {name}"] = scores.numel() / _seconds(lambda: torch.softmax(scores, 1, out=scores), 10 * repeats), "number/s"
    source, target = torch.zeros(_COPIED), torch.zeros(_COPIED)
    result["copy"] = 2 * 4 * _COPIED / _seconds(lambda: target.copy_(source), repeats), "byte/s"
    shape = _POSITIONS, _HIDDEN
    result["dropout"] = _POSITIONS * _HIDDEN / _seconds(lambda: kept(shape, 0.2), 10 * repeats), "number/s"
    return result


def _seconds(work, repeats):
    """Fewest seconds of a call, after a first one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main(repeats=7):
    used = versions()
    print(f"{machine()}; torch {used['torch']}, Python {used['python']}\n")
    rows = [[name, f"{value / 1e9:,.2f}", f"G{unit}"] for name, (value, unit) in measured(repeats).items()]
    print(tabulate(rows, headers=["ceiling", "at most", "unit"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(**parse_settings(sys.argv[1:]))
