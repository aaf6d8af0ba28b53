"""Training targets per second: ours beside RecBole's and RecTools' own training loops.

    python benchmarks/train.py [--models=SASRec,GRU4Rec] [--history=50,200] [--rounds=3] [--seconds=30]
        [--dataset=ml-1m] [--data_path=FOLDER] [--rectools_python=PATH]
    python benchmarks/train.py --stages [RUN_FOLDER] [--history=200] …

Sizes are SASRec's d 64, 2 layers, 2 heads, inner size 256 and dropout 0.2, or GRU4Rec's d 64, inner 128, dropout 0.2; exact
softmax over all items. RecBole trains on one row per prefix in batches of 2,048, ours and RecTools on all positions, 6,400 a
batch. Every figure is a process of its own that trains for `seconds` after a warm-up (two steps at least); the sides take
turns, `rounds` times. Preparing the data is timed apart. Targets are real ones, padding not counted. RecTools (SASRec alone;
its inner size is d) needs an environment of its own: `python -m venv rt && rt/bin/pip install 'rectools[torch]==0.19.0'`, then
--rectools_python=rt/bin/python.

With --stages: seconds of an epoch of stages 2 and 3 against one of stage 1. Training goes on from RUN_FOLDER's settings, or
from the defaults of the model; prompts are embedded as in a run (a few minutes, the first time).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from recbole.utils import init_seed
from tabulate import tabulate

import ceilings
from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TRAIN, build_sequences
from recbole_dpr.data.loaders import TrainingPrompts
from recbole_dpr.materials import attach, prepare_prompts, read_dataset, read_sequences
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.precision import compute_dtype
from recbole_dpr.run import machine, versions
from recbole_dpr.train.trainer import StageTrainer
from recbole_dpr.yamlfile import read_yaml

_SIZES = {
    "SASRec": {"hidden_size": 64, "inner_size": 256, "n_layers": 2, "n_heads": 2, "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2},
    "GRU4Rec": {"embedding_size": 64, "hidden_size": 128, "num_layers": 1, "dropout_prob": 0.2},
}
_POSITIONS, _PREFIX_ROWS = 6400, 2048  # of a batch: ours and RecTools', RecBole's
_WARM_UP = 3  # steps; one where a step is a whole second


class Timed:
    """A loader that is left after a number of seconds, and counts what it gave.

    Args:
        loader: batches; limit: seconds, None for all of an epoch; size: targets of a batch.
    """

    def __init__(self, loader, limit, size):
        self.loader, self.limit, self.size = loader, limit, size
        self.targets = self.seconds = 0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.loader.epoch = getattr(self, "epoch", 0)
        self.targets, start, steps, began = 0, None, 0, time.perf_counter()
        for batch in self.loader:
            now = time.perf_counter()  # the step before is over
            if start is None and steps and (steps >= _WARM_UP or now - began > 1):
                start, self.targets = now, 0
            if start is not None and self.targets:
                self.seconds = now - start
                if self.limit and self.seconds > self.limit:
                    return
            self.targets += self.size(batch)
            steps += 1
            yield batch
        self.seconds = time.perf_counter() - (start or began)


# --- one side, in a process of its own


def child(side, model, history, limit, settings):
    """Train one side for a while: dict of targets, seconds, data (seconds of preparing it)."""
    began = time.perf_counter()
    settings = {**settings, **_SIZES[model], "MAX_ITEM_LIST_LENGTH": history, "show_progress": False}
    dataset_name = settings.pop("dataset")
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            config = make_config(f"DPR_{model}", dataset_name, (), {**settings, "train_batch_size": _POSITIONS, "read_prompts": False})
            sequences = read_sequences(config)
            trainer = _stage(config, 1, _untrained(config, sequences, 1), Path(folder))  # stage 1 meets no prompt
            loader = trainer.model.loader(sequences, config, {}, (config["seed"], 1))
        else:
            from recbole_dpr.zoo import RecBoleModel, dataset_class

            config = make_config(model, dataset_name, (), {**settings, "train_batch_size": _PREFIX_ROWS})
            dataset = read_dataset(config, dataset_class(config))
            sequences = build_sequences(dataset)
            recboles = RecBoleModel(config, dataset, sequences, Path(folder))
            trainer, loader = recboles.trainer, recboles.train_data
        timed = Timed(loader, limit, lambda batch: len(batch.rows) if side == "ours" else len(batch))
        prepared = time.perf_counter() - began
        init_seed(config["seed"], config["reproducibility"])
        trainer._train_epoch(timed, 0)
    return {"targets": timed.targets, "seconds": timed.seconds, "data": prepared}


def _untrained(config, sequences, prompt_size):
    config["prompt_size"], config["n_categories"] = prompt_size, len(sequences.category_names)
    init_seed(config["seed"], config["reproducibility"])
    return promptable(config["model"])(config, ItemVocabulary(sequences.n_items, config)).to(config["device"])


def _stage(config, number, model, folder):
    return StageTrainer(config, model, number, config[f"stage{number}"], lambda: {"score": 0.0}, folder, {})


# --- all sides in turn


def compare(models, lengths, rounds, limit, settings, rectools_python):
    used = versions()
    shown = [f"{name} {used[name]}" for name in ("torch", "recbole", "numpy", "python")]
    print(f"{settings['dataset']}; {machine()}; {', '.join(shown)}; {rounds} rounds of {limit:g} s\n")
    if not rectools_python:
        print("RecTools is left out: name the Python of an environment that has it with --rectools_python= (see --help)\n")
    found = ceilings.measured(3)
    for model in models:
        for length in lengths:
            config = make_config(f"DPR_{model}", settings["dataset"], (), {**_without(settings), **_SIZES[model], "MAX_ITEM_LIST_LENGTH": length})
            sequences = read_sequences(config)
            with tempfile.TemporaryDirectory() as folder:
                sides = {side: _own_process(side, model, length, limit, settings) for side in ("ours", "RecBole")}
                if rectools_python and model == "SASRec":
                    sides["RecTools"] = _rectools(rectools_python, Path(folder) / "interactions.npz", sequences, length, limit)
                results = {side: [] for side in sides}
                for _ in range(rounds):
                    for side, run in sides.items():
                        result = run()
                        results[side].append(result)
                        rate = result["targets"] / result["seconds"]
                        print(f"{model}, history <= {length}, {side}: {rate:,.0f} targets/s", file=sys.stderr, flush=True)
            rates = {side: median(r["targets"] / r["seconds"] for r in runs) for side, runs in results.items()}
            rows = []
            for side, rate in rates.items():
                prepared = median(r["data"] for r in results[side])
                rows.append([side, f"{rate:,.0f}", f"{rates['ours'] / rate:.2f}", f"{prepared:.1f}", f"{results[side][0]['targets']:,}"])
            print(f"### {model}, history <= {length}\n")
            head = ["", "targets/s, median", "ours / this", "data, s", "targets in a round"]
            print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), "\n")
            if model == "SASRec":
                print(_cost(sequences, config, found, rates["ours"]), "\n")
            if "RecTools" in sides:
                print(f"Peer: {results['RecTools'][0]['versions']}.\n")


def _without(settings):
    return {key: value for key, value in settings.items() if key != "dataset"}


def _own_process(side, model, length, limit, settings):
    command = [sys.executable, __file__, "child", json.dumps([side, model, length, limit, settings])]
    return lambda: _last_line(command)


def _rectools(python, file, sequences, length, limit):
    """The training part goes through a file: the other side has none of our packages."""
    _, end = sequences.bounds(TRAIN)
    position = np.arange(len(sequences.items))
    user = sequences.user_of
    mine = position < end[user]
    np.savez(file, user=user[mine], item=sequences.items[mine], time=position[mine])
    script = Path(__file__).with_name("train_rectools.py")
    batch = max(1, _POSITIONS // length)
    return lambda: _last_line([python, str(script), str(file), str(length), str(batch), str(limit)])


def _last_line(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def floor_of_target(sequences, config, found):
    """What a target of SASRec must take by the cost model, forward and backward, at the ceilings `found` (ceilings.measured).

    Returns:
        ({part: seconds}, {part: FLOP} of those that are products, float: positions that a position attends to, on average).
    """
    d, inner, n_layers = config["hidden_size"], config["inner_size"], config["n_layers"]
    loader = promptable(config["model"]).loader(sequences, config, {}, 0)
    lengths = loader.lengths.astype(np.float64)
    context = (lengths * (lengths + 1) / 2).sum() / lengths.sum()
    # backward takes twice what forward takes
    flops = {
        "scores of all items": 3 * 2 * d * sequences.n_items,
        "linear layers": 3 * n_layers * (8 * d * d + 4 * d * inner),
        "attention": 3 * n_layers * 4 * d * context,
    }
    softmax, backbone = _dtypes(config)
    rate = {name: value for name, (value, _) in found.items()}
    seen = n_layers * config["n_heads"] * context  # weights of the attention, each with an exponential and a draw of dropout
    scores = (1 / rate[f"product, scores, {softmax}"] + 2 / rate[f"product, gradient, {softmax}"]) / 3
    seconds = {
        "scores of all items": flops["scores of all items"] * scores,
        "linear layers": flops["linear layers"] / rate[f"product, square, {backbone}"],
        "attention": flops["attention"] / rate[f"product, square, {backbone}"] + seen / rate[f"softmax, {backbone}"],
        "softmax": sequences.n_items / rate[f"softmax, {softmax}"],
        "dropout": (d * (1 + 2 * n_layers) + seen) / rate["dropout"],
    }
    return seconds, flops, context


def _dtypes(config):
    return [str(compute_dtype(config[f"{part}_precision"], config["device"])).removeprefix("torch.") for part in ("softmax", "backbone")]


def _cost(sequences, config, found, rate):
    """The cost model of one target as a table, and the share of its floor that was reached."""
    seconds, flops, context = floor_of_target(sequences, config, found)
    floor = sum(seconds.values())
    rows = [[part, f"{flops[part] / 1e6:.2f}" if part in flops else "", f"{1e6 * value:.2f}"] for part, value in seconds.items()]
    rows.append(["**floor**", f"{sum(flops.values()) / 1e6:.2f}", f"{1e6 * floor:.2f}"])
    rows.append(["measured", "", f"{1e6 / rate:.2f}"])
    table = tabulate(rows, headers=["one target", "MFLOP", "microseconds"], tablefmt="github", disable_numparse=True)
    softmax, backbone = _dtypes(config)
    return f"{table}\n\nShare of the floor: {100 * floor * rate:.0f} % (softmax in {softmax}, backbone in {backbone}, mean context {context:.0f})."


# --- stages 2 and 3 against stage 1


def stages(folder, model, length, rounds, limit, settings):
    kept = read_yaml(Path(folder) / "config.yaml") if folder else {"model": f"DPR_{model}", "dataset": settings["dataset"], **_SIZES[model], "MAX_ITEM_LIST_LENGTH": length}
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), {**kept, **_without(settings)})
    sequences = read_sequences(config)
    materials, _ = prepare_prompts(config, sequences, show_progress=True)
    bank = materials.bank
    model = _untrained(config, sequences, bank.vectors.shape[1])
    attach(model, materials)
    model.start_prompting()
    rows, results = [], {number: [] for number in (1, 2, 3)}
    with tempfile.TemporaryDirectory() as scratch:
        for round_ in range(rounds):
            for number in results:
                own = config[f"stage{number}"]
                prompts = None if number == 1 else TrainingPrompts(sequences, bank, config, own["prompts"])
                loader = model.loader(sequences, config, own, (config["seed"], number), prompts)
                timed = Timed(loader, limit, lambda batch: len(batch.rows))
                _stage(config, number, model, Path(scratch))._train_epoch(timed, round_)
                results[number].append(timed.targets / timed.seconds)
    targets = int(loader.lengths.sum()) if hasattr(loader, "lengths") else None
    rates = {number: median(values) for number, values in results.items()}
    for number, rate in rates.items():
        rows.append([f"stage {number}", f"{rate:,.0f}", f"{targets / rate:.1f}" if targets else "", f"{rates[1] / rate:.2f}"])
    used = versions()
    print(f"{config['model']} on {config['dataset']}; {machine()}; torch {used['torch']}; {rounds} rounds of {limit:g} s\n")
    head = ["", "positions/s, median", "seconds of an epoch", "of a stage 1 epoch"]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


def _listed(value):
    return [v.strip() for v in value.split(",")] if isinstance(value, str) else value if isinstance(value, list) else [value]


def main(argv):
    of_stages = "--stages" in argv
    argv = [argument for argument in argv if argument != "--stages"]
    folder = argv.pop(0) if argv and not argv[0].startswith("--") else None
    settings = {"dataset": "ml-1m", **parse_settings(argv, ("model", "dataset", "models", "history", "rectools_python"))}
    models, lengths = _listed(settings.pop("models", "SASRec,GRU4Rec")), list(map(int, _listed(settings.pop("history", "50,200"))))
    rounds, limit, python = settings.pop("rounds", 3), settings.pop("seconds", 30), settings.pop("rectools_python", None)
    if of_stages:
        return stages(folder, models[0], lengths[-1], rounds, limit, settings)
    compare(models, lengths, rounds, limit, settings, python)


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        print(json.dumps(child(*json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
