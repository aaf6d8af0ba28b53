"""Does a model hear a category where none is meant: "no Meryl Streep tonight", "not another three-hour one".

    python benchmarks/neutral.py RUN_FOLDER [--prompt_encoder=FOLDER]

RUN_FOLDER is a finished run of a DPR model on a dataset of films. The requests of dataset/prompts/neutral_heldout.tsv mean no genre
and name none; each is one clause of the intent that the file gives. Prints Markdown: the sum over categories of how much each counts
as meant (`MeaningReader`), the share of requests with one that counts by more than half, and, of refusals, the share of the
text's weight that is left (`Promptable.heard`).
"""

import csv
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.prompts.templates import NEGATIVE
from recbole_dpr.resources import dataset_dir
from recbole_dpr.serving.recommender import load


@torch.no_grad()
def main(folder, settings):
    rec = load(Path(folder), prompt_encoder=settings.get("prompt_encoder"))
    with open(dataset_dir() / "prompts" / "neutral_heldout.tsv", encoding="utf-8", newline="") as f:
        requests = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = []
    for intent in ("negative", "positive"):
        prompt = torch.from_numpy(rec.prompt_vectors([row["text"] for row in requests if row["intent"] == intent]))
        meant = rec.model.meaning_reader(prompt)
        left = (rec.model.heard(prompt, NEGATIVE)[:, -1] / rec.model.named(prompt, NEGATIVE)[:, -1]).mean()
        sure = (meant > 0.5).any(1).float().mean()
        rows.append([f"{intent} ({len(prompt)})", f"{meant.sum(1).mean():.2f}", f"{sure:.2f}", f"{left:.2f}" if intent == "negative" else ""])
    head = ["requests that mean no genre", "heard in all", "share with one above .5", "left of the text's weight"]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
