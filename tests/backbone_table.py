"""docs/backbones.md: every sequential model of RecBole tried as a backbone, on the tiny dataset.

    python tests/backbone_table.py > docs/backbones.md
"""

import tempfile
import warnings
from pathlib import Path

import tiny
from recbole_dpr import load, run_dpr
from recbole_dpr.errors import UserError
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import AllPositions, MaskedBERT4Rec, sequential_models

_HEAD = """# Backbones

Every sequential recommender of RecBole 1.2, tried: `--model=DPR --backbone=NAME` through all three stages on a tiny dataset,
then loaded and asked with a prompt. Written by `python tests/backbone_table.py > docs/backbones.md`; a test compares each row
with what happens now.

What a backbone needs: `forward(item_seq, item_seq_len)` or `forward(item_seq)` that gives one state for each history, an
`item_embedding`, scores that are dot products of the two, and a constructor that is content with the number of items, so that a
saved model loads without its dataset.

"""


def outcome(name, folder):
    """One row of the table: "works" and how it trains, or "works not" and why.

    Args:
        folder: Path with what `tiny.write` and `tiny.write_texts` wrote.
    """
    model = f"DPR_{name}"
    try:
        result = run_dpr(model, "tiny", config_dict=tiny.settings(folder, model, item_texts=str(folder), train_batch_size=300, prefix_batch_size=100, epochs=1))
    except UserError as error:
        return "works not", str(error).split(" cannot be wrapped: ")[1].split("; docs/")[0]
    assert {row["method"] for row in result["results"]} >= {model, f"{model}/stage2", "Base", "Filter"}
    rec = load(result["folder"])
    assert len(rec.recommend(["i1", "i2"], "a comedy, but no horror", k=5).items) == 5
    cls = promptable(model)
    if issubclass(cls, AllPositions):
        return "works", "causal: all positions of packed sequences at once"
    if issubclass(cls, MaskedBERT4Rec):
        return "works", "stage 1 on its masked objective, stages 2 and 3 on sampled histories with a mask at the end"
    return "works", "sampled histories; stage 1 on its own loss"


def row(name, works, how):
    """A line of the table."""
    return f"| {name} | {works} | {how} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        tiny.write(place)
        tiny.write_texts(place)
        rows = [row(name, *outcome(name, place)) for name in sequential_models()]
    print(_HEAD + "\n".join(["| RecBole's model | as a backbone | how it trains, or why not |", "|---|---|---|", *rows]))
