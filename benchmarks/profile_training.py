"""Where the time of a training step of SASRec goes, beside what the cost model says that each part must take.

    python benchmarks/profile_training.py [--history=50] [--steps=20] [--dataset=ml-1m] [--data_path=FOLDER]

Stage 1 with the sizes of benchmarks/train.py, exact softmax, one thread, batches made beforehand. torch's profiler gives the
parts' shares, each operator without those that it calls; they share out the processor time of the same steps without the profiler,
so what Python takes between operators is spread over all of them, and small ones look dearer than they are. Ceilings are measured
just before; the floor of dropout and attention is that of benchmarks/train.py. Prints Markdown.
"""

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import ceilings
import torch
from recbole.utils import init_seed
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from train import _POSITIONS, _SIZES, _stage, _untrained, floor_of_target

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.materials import read_sequences
from recbole_dpr.run import machine, versions

_PRODUCTS = ("aten::mm", "aten::addmm")
# operators -> part, where the shapes of their arguments do not say it
_PARTS = {
    "attention": ("bmm", "baddbmm", "_softmax", "_softmax_backward_data"),
    "dropout": ("random_", "ge", "mul_"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "conversions and copies": ("copy_",),
    "sums: residuals, gradients, masks times values": ("add", "add_", "mul", "sum", "sub_", "neg"),
    "gathering rows": ("index_select", "index", "gather", "index_add_", "_index_put_impl_", "embedding_dense_backward"),
    "optimiser": ("_fused_adam_",),
}
_PART_OF = {f"aten::{operator}": part for part, operators in _PARTS.items() for operator in operators}


def part_of(operator, shapes, n_items):
    """The part of a step that an operator belongs to; shapes: of its arguments, a list of sizes for each tensor."""
    if any(n_items in shape for shape in shapes if len(shape) == 2):
        if operator in _PRODUCTS:
            return "scores of all items"
        if operator == "aten::_softmax":
            return "softmax"
    return "linear layers" if operator in _PRODUCTS else _PART_OF.get(operator, "allocation, views, calls and the rest")


def main(history=50, steps=20, **settings):
    torch.set_num_threads(1)
    settings = {"dataset": "ml-1m", **settings, **_SIZES["SASRec"], "MAX_ITEM_LIST_LENGTH": history, "show_progress": False}
    name, found = settings.pop("dataset"), ceilings.measured(5)
    config = make_config("DPR_SASRec", name, (), {**settings, "train_batch_size": _POSITIONS, "read_prompts": False})
    sequences = read_sequences(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _stage(config, 1, _untrained(config, sequences, 1), Path(folder))
        loader = trainer.model.loader(sequences, config, {}, (config["seed"], 1))
        batches = _Batches(batch for batch, _ in zip(loader, range(steps)))
        init_seed(config["seed"], config["reproducibility"])
        trainer._train_epoch(batches, 0)  # kernels for all shapes are made now
        seconds = -time.process_time()
        trainer._train_epoch(batches, 0)
        seconds += time.process_time()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            trainer._train_epoch(batches, 0)
    spent = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        spent[part_of(event.key, [shape for shape in event.input_shapes if shape], sequences.n_items)] += event.self_cpu_time_total
    targets = sum(len(batch.rows) for batch in batches)
    floors, _, _ = floor_of_target(sequences, config, found)
    rows = []
    for part, own in sorted(spent.items(), key=lambda item: -item[1]):
        share = own / sum(spent.values())
        floor = f"{1e6 * floors[part]:.2f}" if part in floors else ""
        rows.append([part, f"{1e6 * share * seconds / targets:.2f}", f"{100 * share:.0f}", floor])
    rows.append(["**all**", f"{1e6 * seconds / targets:.2f}", "100", f"{1e6 * sum(floors.values()):.2f}"])
    print(f"SASRec on {name}, history <= {history}; {machine()}; torch {versions()['torch']}; {steps} steps, {targets:,} targets\n")
    print(tabulate(rows, headers=["part of a step", "microseconds a target", "%", "floor"], tablefmt="github", disable_numparse=True))


class _Batches(list):
    """Batches as a loader has them, which is told the epoch."""


if __name__ == "__main__":
    main(**parse_settings(sys.argv[1:]))
