"""What the evaluation costs: every test position, all tasks, windows and prompt kinds, for Base, Filter and the DPR model.

    python benchmarks/evaluate.py RUN_FOLDER [--data_path=FOLDER] [--eval_positions=all]
    python benchmarks/evaluate.py --model=DPR_SASRec --dataset=ml-1m [--data_path=FOLDER] [--key=value …]

RUN_FOLDER is a finished run of a DPR model; without one the model is untrained. Prompts are random vectors here, since
embedding some hundred thousand of them takes longer than the rest and is cached: figures mean nothing. Each counts as read
right, so that all sentences which ask for one tag ask for the same. Memory is the process's peak, data and libraries included. Prints Markdown.
"""

import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TEST, VALID
from recbole_dpr.evaluation import methods
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import prompts_for
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.prompts.bank import PromptTable
from recbole_dpr.run import machine, peak_memory_mb, versions
from recbole_dpr.serving.recommender import load
from recbole_dpr.yamlfile import read_yaml

_PROMPT_SIZE = 384  # of the default encoder's vectors


def main(folder, settings):
    kept = read_yaml(Path(folder) / "config.yaml") if folder else {}
    settings = {**kept, "eval_positions": "all", **settings}
    config = make_config(settings.pop("model", "DPR_SASRec"), settings.pop("dataset", "ml-1m"), (), settings)
    rows, clock = [], _Clock()
    sequences = read_sequences(config)
    rows.append(["reading the data", "", *clock.lap()])
    materials = prepare_queries(config, sequences)
    test, prompted = materials.test, [p for p in materials.test if p.kind != "none"]
    rows.append(["drawing the queries", sum(map(len, test)), *clock.lap()])
    model = load(folder).model if folder else _untrained(config, sequences)
    model.attach_prompts(_random_prompts(materials, config["prompt_size"] or _PROMPT_SIZE), None, model.tagger)
    evaluator, evaluation = Evaluator(sequences, config), _Clock()
    clock.lap()
    states, answering = methods.StateTable(evaluator, model, test), None
    rows.append(["states, unprompted backbone", len(states.positions), *clock.lap()])
    if model.answering is not model:
        answering = methods.StateTable(evaluator, model.answering, prompted)
        rows.append(["states, backbone of prompted requests", len(answering.positions), *clock.lap()])
    base = methods.Base(states, model.item_matrix().detach())
    compared = {
        "Base": (base, test),
        "Filter": (methods.Filter(base, torch.from_numpy(sequences.categories)), prompted),
        config["model"]: (methods.Prompted(states, answering, model), test),
    }
    for name, (method, sets) in compared.items():
        found = evaluator.rows(name, method, sets)
        rows.append([name, sum(row["queries"] for row in found), *clock.lap()])
    rows.append(["**evaluation: states and methods**", "", *evaluation.lap()])
    used = versions()
    print(f"{config['dataset']}: {sequences.n_items - 1:,} items; {machine()}; torch {used['torch']}, Python {used['python']}\n")
    shown = [[name, f"{count:,}" if count else "", f"{seconds:.1f}", f"{peak:,.0f}"] for name, count, seconds, peak in rows]
    print(tabulate(shown, headers=["", "queries or states", "seconds", "peak memory so far, MiB"], tablefmt="github", disable_numparse=True))


def _random_prompts(materials, size):
    """Vectors for the bank's texts, and a PromptTable of what they ask for if each is read right: the category's name, the bare tag."""
    bank, read = materials.bank, []
    for part, sets in ((VALID, materials.valid), (TEST, materials.test)):
        for prompted in sets:
            if prompted.kind == "category":
                read.append((prompted.prompt, bank.category[prompted.queries.intent][prompted.queries.category, 0]))
            elif prompted.kind == "tag":
                read.append((prompted.prompt, prompts_for(bank, prompted.queries, "tag", part, "bare")[0]))
    meant = torch.arange(len(bank.all_texts))
    for prompt, description in read:
        meant[prompt] = torch.from_numpy(description)
    bank.vectors = torch.randn(len(bank.all_texts), size, dtype=torch.float16)  # as large as a run has them
    distinct, row = torch.unique(meant, return_inverse=True)
    print(f"{len(meant):,} prompts, which ask for {len(distinct):,} things\n")
    return PromptTable(_random(len(distinct), size), row)


def _random(n, size):
    return torch.randn(n, size).mul_(size**-0.5)  # of norm 1, nearly


@torch.no_grad()
def _untrained(config, sequences):
    """The model as a run builds it, with an item side that is random instead of embedded."""
    config["prompt_size"], config["n_categories"] = _PROMPT_SIZE, len(sequences.category_names)
    model = promptable(config["model"])(config, ItemVocabulary(sequences.n_items, config)).eval()
    model.item_side.normal_()
    return model


class _Clock:
    """Seconds since the last lap, and the process's peak memory in MiB."""

    def __init__(self):
        self.start = time.perf_counter()

    def lap(self):
        start, self.start = self.start, time.perf_counter()
        return self.start - start, peak_memory_mb()


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("--") else None
    main(folder, parse_settings(sys.argv[2 if folder else 1 :]))
