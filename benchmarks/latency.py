"""What a prompt costs: latency of single requests and throughput of batches, without and with one.

    python benchmarks/latency.py RUN_FOLDER [--requests=200] [--history=50] [--unprompted_weight=W]

RUN_FOLDER is a finished run of a DPR model. Histories are random items, `history` of them; prompts are different
each time, of one clause. "prompt known": its vector is in memory from an earlier request. Seconds are of the processor, over all
threads, so that other jobs disturb little: with one thread (OMP_NUM_THREADS=1) they are what a caller waits. Prints Markdown.
"""

import sys
import time

import numpy as np
import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.serving.recommender import load

_WARM_UP, _BATCHES, _REPEATS = 10, (1, 16, 64, 256), 5


def main(folder, requests=200, history=50, unprompted_weight=None):
    rec, rng = load(folder, unprompted_weight=unprompted_weight), np.random.default_rng(0)
    count = requests + _WARM_UP
    histories = [rng.choice(rec.items, min(history, len(rec.items)), replace=False).tolist() for _ in range(count)]
    prompts = [f"something like story number {n}" for n in range(count)]
    kinds, taken = ("no prompt", "prompt new", "prompt known"), []
    print(f"{len(rec.items):,} items, histories of {history}, {torch.get_num_threads()} threads\n")
    for h, prompt in zip(histories, prompts):  # in turns; what was new is then known
        taken.append([_seconds(rec, [h], [own]) for own in (None, prompt, prompt)])
    single = dict(zip(kinds, np.median(taken[_WARM_UP:], axis=0)))
    base = single["no prompt"]
    rows = [[name, f"{1000 * value:.1f}", f"{value / base:.2f}"] for name, value in single.items()]
    print(tabulate(rows, headers=["one request", "ms, median", "of no prompt"], tablefmt="github", disable_numparse=True), "\n")
    rows = []
    for size in _BATCHES:
        batch = [histories[n % count] for n in range(size)]
        known = [prompts[n % count] for n in range(size)]
        turns = [[_seconds(rec, batch, own) for own in ([None] * size, known)] for _ in range(_REPEATS)]
        plain, asked = np.median(turns, axis=0)
        rows.append([size, f"{size / plain:,.0f}", f"{size / asked:,.0f}", f"{asked / plain:.2f}"])
    head = ["batch", "requests/s, no prompt", "requests/s, prompt known", "time, of no prompt"]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


def _seconds(rec, histories, prompts):
    start = time.process_time()
    rec.recommend_batch(histories, prompts)
    return time.process_time() - start


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], **parse_settings(sys.argv[2:]))
