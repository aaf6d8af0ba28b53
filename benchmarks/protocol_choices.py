"""What each open choice of the evaluation protocol does to the Base and Filter rows, beside the paper's.

    python benchmarks/protocol_choices.py RUN_FOLDER [--data_path=FOLDER]

RUN_FOLDER is a finished run of a DPR model; its stage 1 is evaluated, nothing is trained. Prints Markdown.
"""

import sys
from pathlib import Path

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.evaluation import methods, report
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.serving.recommender import load
from recbole_dpr.train import checkpoints
from recbole_dpr.yamlfile import read_yaml

CHOICES = {
    "defaults": {},
    "eval_positions: all": {"eval_positions": "all"},
    "mask_history: False": {"mask_history": False},
    "short_windows: True": {"short_windows": True},
    "eval_neg_target: nearest": {"eval_neg_target": "nearest"},
}
COLUMNS = [("Base", "SEQ"), ("Base", "POS"), ("Filter", "POS"), ("Base", "NEG"), ("Filter", "NEG")]


def main(folder, settings):
    folder = Path(folder)
    kept = read_yaml(folder / "config.yaml")
    model_name, dataset_name = kept.pop("model"), kept.pop("dataset")
    model = load(folder).model
    model.load_state_dict(checkpoints.load(folder / "checkpoints" / "stage1.best.pt")["state_dict"])
    rows = []
    for name, choice in CHOICES.items():
        config = make_config(model_name, dataset_name, (), {**kept, **settings, **choice})
        sequences = read_sequences(config)
        test = prepare_queries(config, sequences).test
        test = [p for p in test if p.kind in ("none", "category")]
        evaluator = Evaluator(sequences, config)
        base = methods.Base(methods.StateTable(evaluator, model, test), model.item_matrix().detach())
        compared = {"Base": base, "Filter": methods.Filter(base, torch.from_numpy(sequences.categories))}
        values = {}
        for method, task in COLUMNS:
            found = [evaluator.mean(p, compared[method].score)["NDCG@10"] for p in test if p.queries.task == task]
            values[method, task] = sum(found) / len(found)
        queries = sum(len(p) for p in test)
        rows.append([name, queries, *(f"{values[column]:.4f}" for column in COLUMNS)])
    paper = report.paper_figures(dataset_name, model_name.removeprefix("DPR_"))
    figures = [paper.get((method, task, None if task == "SEQ" else "avg", "NDCG@10")) for method, task in COLUMNS]
    rows.append(["*paper*", "", *("" if value is None else f"*{value:.4f}*" for value in figures)])
    head = ["NDCG@10", "queries", *(f"{method} {task}" for method, task in COLUMNS)]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
