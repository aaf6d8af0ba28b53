"""What the items' text alone gives, on validation: Base + w x text, by cosine and by likelihood, nothing trained.

    python benchmarks/item_text.py RUN_FOLDER [--data_path=FOLDER] [--prompt_encoder=FOLDER]

RUN_FOLDER is a finished run of a DPR model; its stage 1 is Base. Tags are measured with the column that the prompt
quotes held out of the items' side, since validation has no tags of its own. Prints Markdown.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.evaluation import methods
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.materials import prepare_prompts, read_sequences
from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable
from recbole_dpr.prompts.item_text import LikelihoodText, MeanText
from recbole_dpr.serving.recommender import load
from recbole_dpr.train import checkpoints
from recbole_dpr.yamlfile import read_yaml

_COSINE, _LIKELIHOOD = (14, 20, 28, 40), (0.14, 0.2, 0.28, 0.4, 0.56)  # w


def main(folder, settings):
    folder = Path(folder)
    kept = read_yaml(folder / "config.yaml")
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), {**kept, **settings})
    model = load(folder, prompt_encoder=settings.get("prompt_encoder")).model
    model.load_state_dict(checkpoints.load(folder / "checkpoints" / "stage1.best.pt")["state_dict"])
    sequences = read_sequences(config)
    materials, _ = prepare_prompts(config, sequences, True)
    bank, evaluator = materials.bank, Evaluator(sequences, config)
    sets = {p.name: p for p in materials.valid if p.name in ("POS/wish", "POS/tag")}
    base = methods.Base(methods.StateTable(evaluator, model, list(sets.values())), model.item_matrix().detach())
    silent = np.full_like(bank.about, NO_PROMPT)
    forms = {
        "cosine": (MeanText, bank.about, PromptTable(bank.vectors), _COSINE),
        "of the description in the prompt": (MeanText, bank.about, bank.asked, _COSINE),
        "its likelihood given the phrases": (LikelihoodText, silent, bank.asked, _LIKELIHOOD),
        "and given title and categories": (LikelihoodText, bank.about, bank.asked, _LIKELIHOOD),
    }
    rows = []
    for name, (kind, about, prompts, grid) in forms.items():

        def tuned(phrase, prompted):
            text = kind(SimpleNamespace(phrase=phrase, about=about, asked=bank.asked))
            return methods.tuned_weight(evaluator, base, methods.TextFit(text, prompts), [prompted], grid)[1]

        parts = [(tuned(np.delete(bank.phrase, column, 1), part), len(part)) for column, part in _by_column(bank, sets["POS/tag"])]
        tags = sum(value * size for value, size in parts) / sum(size for _, size in parts)
        rows.append([name, f"{tuned(bank.phrase, sets['POS/wish']):.4f}", f"{tags:.4f}"])
    print(tabulate(rows, headers=["NDCG@10, Base + w x text", "POS by wish", "POS by held-out tag"], tablefmt="github", disable_numparse=True))


def _by_column(bank, prompted):
    """The queries by the column of tags that their prompts quote, which then need leave nothing out."""
    column = (bank.phrase[prompted.queries.spoken_of] == prompted.own_phrase[:, None]).argmax(1)
    for number in range(bank.texts.tags["train"].shape[1]):
        rows = np.flatnonzero(column == number)
        yield number, replace(prompted, queries=prompted.queries.take(rows), prompt=prompted.prompt[rows], own_phrase=np.full(len(rows), NO_PROMPT))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
