"""What the data cost: reading, sequences, a training epoch's batches and the evaluation set, ours beside RecBole's.

    python benchmarks/data.py [--folder=FOLDER] [--sizes=[100000,500000,2000000,12400000]] [--repeats=3] [--memory_gb=12]
                              [--seconds=900] [--keep_core=20]

Datasets of `benchmarks/synthetic.py` are made in FOLDER where they are not there (default: a temporary one); a size is
about the interactions after the k-core filter. Each side runs in a process of its own, in turns; RecBole's is stopped
at `memory_gb` or `seconds`, and then not tried on larger ones. Prints Markdown: medians of the repeats, in seconds of
processor time, which neither side spends in more than one thread: what else runs on the machine does not count.

RecBole's side is what its `run_recbole` does for SASRec, on the next item alone: `create_dataset`, `data_preparation`,
one pass over the training batches. Ours draws positive and negative prompts for the batches besides, and its evaluation
set is of all tasks and windows; RecBole has none beyond its rows of history and target, made with the sequences.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import synthetic
from tabulate import tabulate

_PHASES = ("read + filter", "sequences", "training batches", "evaluation set", "again, from the cache")
_FULL = {"users": 365_000, "items": 22_000, "interactions": 21_800_000, "categories": 60}
_FULL_SIZE = 12_400_000  # what is about left of it


def main(folder=None, sizes=(100_000, 500_000, 2_000_000, _FULL_SIZE), repeats=3, memory_gb=12, seconds=900, keep_core=20):
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return main(temporary, sizes, repeats, memory_gb, seconds, keep_core)
    rows, ended = [], False
    for size in sizes:
        data = _dataset(folder, size)
        for _ in range(repeats if size < 5_000_000 else 1):
            found = {"ours": _measured("ours", folder, data, keep_core, memory_gb, seconds)}
            if not ended:
                found["RecBole"] = _measured("RecBole", folder, data, keep_core, memory_gb, seconds)
                ended = "ended" in found["RecBole"]
            rows.append((size, found))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {_versions()}\n")
    print(tabulate(_table(rows), headers=["interactions", "side", *(f"{p}, s" for p in _PHASES), "all, s", "peak GB", "ratio s, GB"], tablefmt="github"))
    for size, found in rows:
        if "ended" in found.get("RecBole", {}):
            print(f"\nRecBole at {size:,}: {found['RecBole']['ended']}")


def _table(rows):
    for size in dict.fromkeys(size for size, _ in rows):
        runs = [found for s, found in rows if s == size]
        ours = None
        for side in ("ours", "RecBole"):
            of_side = [found[side] for found in runs if "ended" not in found.get(side, {"ended": ""})]
            if not of_side:
                continue
            middle = {key: median(run[key] for run in of_side) for key in of_side[0]}
            ours = ours or middle
            ratio = f"{middle['total'] / ours['total']:.1f}, {middle['peak_gb'] / ours['peak_gb']:.1f}"
            times = [f"{middle[phase]:.2f}" if phase in middle else "" for phase in _PHASES]
            yield [f"{int(middle['interactions']):,}", side, *times, f"{middle['total']:.1f}", f"{middle['peak_gb']:.2f}", ratio]


def _dataset(folder, size):
    name, share = f"synthetic-{size}", size / _FULL_SIZE
    if not (Path(folder) / name / f"{name}.item").is_file():
        # a smaller dataset has fewer users and, by the root, fewer items
        users, items = int(_FULL["users"] * share), int(_FULL["items"] * share**0.5)
        synthetic.write(folder, name, users, items, int(_FULL["interactions"] * share), _FULL["categories"])
    return name


def _measured(side, folder, name, keep_core, memory_gb, seconds):
    """One side in a process of its own: seconds of its phases and peak memory, or {"ended": why}."""
    command = [sys.executable, __file__, "--measure", side, str(folder), name, str(keep_core)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process, started = subprocess.Popen(command, stdout=output, stderr=errors), time.monotonic()
        while process.poll() is None:
            used, passed = _resident_gb(process.pid), time.monotonic() - started
            if used > memory_gb or passed > seconds:
                process.kill()
                process.wait()
                errors.seek(0)
                phase = (["start"] + [line for line in errors.read().splitlines() if line.startswith("begin ")])[-1].removeprefix("begin ")
                return {"ended": f"stopped after {passed:.0f} s with {used:.1f} GB in memory, in '{phase}'"}
            time.sleep(0.05)
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            return {"ended": f"exit code {process.returncode}: {errors.read().strip().splitlines()[-1]}"}
        return json.loads(output.read().splitlines()[-1])


def _resident_gb(pid):
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class _Clock:
    """Processor seconds of phases, one after another; says on stderr which has begun."""

    def __init__(self):
        self.seconds = {}

    def phase(self, name, work):
        print(f"begin {name}", file=sys.stderr, flush=True)
        start = time.process_time()
        result = work()
        self.seconds[name] = time.process_time() - start
        return result


def _ours(folder, name, keep_core):
    from recbole_dpr.config import make_config
    from recbole_dpr.data.dataset import build_sequences
    from recbole_dpr.data.loaders import PackedLoader, TrainingPrompts
    from recbole_dpr.evaluation.queries import build_queries
    from recbole_dpr.materials import prepare_queries, read_dataset, read_sequences

    cache = tempfile.mkdtemp(dir=folder)
    config = make_config("DPR_SASRec", name, (), {**_settings(folder, keep_core), **synthetic.SETTINGS, "data_cache_dir": cache})
    clock = _Clock()
    dataset = clock.phase("read + filter", lambda: read_dataset(config))
    sequences = clock.phase("sequences", lambda: build_sequences(dataset))
    del dataset
    clock.phase("evaluation set", lambda: build_queries(sequences, config))
    bank = prepare_queries(config, sequences).bank
    prompts = TrainingPrompts(sequences, bank, config, {"category": 1.0})
    loader = PackedLoader(sequences, config["MAX_ITEM_LIST_LENGTH"], config["train_batch_size"], 1, prompts)
    clock.phase("training batches", lambda: sum(len(batch.rows) for batch in loader))
    peak = _peak_gb()  # what follows is of a second run
    read_sequences(config)
    again = clock.phase("again, from the cache", lambda: read_sequences(config))
    for file in Path(cache).iterdir():
        file.unlink()
    Path(cache).rmdir()
    return clock.seconds, len(again.items), peak


def _recbole(folder, name, keep_core):
    import recbole_dpr  # noqa: F401, its patches: RecBole 1.2 runs with neither NumPy 2 nor pandas 3
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_logger

    sys.argv = sys.argv[:1]
    more = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}, "train_neg_sample_args": None}
    settings = {**_settings(folder, keep_core), **more, "load_col": synthetic.SETTINGS["load_col"]}
    config = Config(model="SASRec", dataset=name, config_dict=settings)
    clock = _Clock()
    dataset = clock.phase("read + filter", lambda: create_dataset(config))
    interactions = len(dataset.inter_feat)
    train, *_ = clock.phase("sequences", lambda: data_preparation(config, dataset))
    clock.phase("training batches", lambda: sum(len(batch) for batch in train))
    return clock.seconds, interactions, _peak_gb()


def _settings(folder, keep_core):
    core = f"[{keep_core},inf)"
    return {"data_path": str(folder), "user_inter_num_interval": core, "item_inter_num_interval": core, "MAX_ITEM_LIST_LENGTH": 50, "show_progress": False}


def _peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _versions():
    from importlib.metadata import version

    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("recbole", "torch", "numpy", "pandas"))])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        side, folder, name, keep_core = sys.argv[2:]
        seconds, interactions, peak = {"ours": _ours, "RecBole": _recbole}[side](folder, name, int(keep_core))
        total = sum(value for phase, value in seconds.items() if "again" not in phase)
        print(json.dumps({**seconds, "interactions": interactions, "total": total, "peak_gb": peak}))
    elif "--help" in sys.argv:
        sys.exit(__doc__)
    else:
        from recbole_dpr.cli import parse_settings

        main(**parse_settings(sys.argv[1:]))
