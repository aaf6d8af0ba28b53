"""The evaluation of free-text steering: its lists are the ones served, its shares are counted right, and it tells steering from routing."""

import re

import numpy as np
import pytest
import torch

from benchmarks import free_text, neutral
from recbole_dpr import load
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TEST
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import evaluated_positions
from recbole_dpr.materials import read_sequences
from recbole_dpr.prompts.intent import Clause
from recbole_dpr.resources import dataset_dir
from recbole_dpr.yamlfile import read_yaml

NEUTRAL = dataset_dir() / "prompts" / "neutral_heldout.tsv"
TWO = [Clause("a western", "positive"), Clause("horror", "negative")]


@pytest.mark.parametrize(("meant", "share"), [([1, 0, 0], 2 / 6), ([0, 1, 0], 3 / 6), ([1, 1, 0], 4 / 6), ([0, 0, 1], 0)])
def test_shares(meant, share):
    categories = np.array([[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)
    lists = np.array([[1, 2, 3], [4, 3, 2]])
    assert free_text.shares(lists, categories, np.array(meant, dtype=bool)) == pytest.approx(share)


@pytest.mark.parametrize("clauses", [[], TWO[:1], TWO])
def test_lists_are_what_is_served(tiny_model, clauses):
    rec, kept = load(tiny_model), read_yaml(tiny_model / "config.yaml")
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), kept)
    sequences = read_sequences(config)
    positions = evaluated_positions(sequences, "first", TEST)[:7]
    with torch.no_grad():
        lists = free_text.Lists(rec, Evaluator(sequences, config), positions)
        found = lists.top(clauses, [1, 2]) if clauses else [lists.unprompted()]
    starts = sequences.offsets[sequences.user_of[positions]]
    histories = [sequences.item_tokens[sequences.items[a:b]].tolist() for a, b in zip(starts, positions)]
    for strength, top in zip([1, 2], found):
        answers = rec.recommend_batch(histories, [clauses] * 7, strength=strength)
        assert sequences.item_tokens[top].tolist() == [answer.items for answer in answers]


def test_an_unknown_category_is_named(tmp_path):
    (tmp_path / "wishes.tsv").write_text("text\tintent\tcategories\nfun\tpositive\tcomedy|farce\n")
    with pytest.raises(UserError, match="farce"):
        free_text.read_wishes(tmp_path / "wishes.tsv", ("comedy", "drama"))


def test_steering_and_routing_are_told_apart(tiny_model, tmp_path, capsys):
    """A wish that the router takes for its opposite: violated end to end, met with the intent given."""
    rows = ["a western\tpositive\twestern", "a western\tnegative\twestern"]
    (tmp_path / "wishes.tsv").write_text("\n".join(["text\tintent\tcategories", *rows]) + "\n")
    free_text.main(tiny_model, {"wishes": tmp_path / "wishes.tsv", "users": 20})
    text = capsys.readouterr().out
    assert "2 wishes, 20 users" in text
    table = {row[0].strip(): row for row in (line.split("|")[1:] for line in text.splitlines() if line.startswith("|"))}
    base, routed, given = (
        [float(re.match(r" *([\d.]+)", cell).group(1)) for cell in table[name][2:4]] for name in ("Base", "routed, strength 1", "given, strength 1")
    )
    assert routed[0] == given[0] > base[0]
    assert routed[1] == routed[0] and given[1] < base[1]


def test_what_is_heard_in_requests_that_mean_no_genre(tiny_model, capsys):
    """One row for each intent: how much is heard, of how many, and what is left of a refusal's text."""
    neutral.main(tiny_model, {})
    refusals, wishes = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:])
    assert re.fullmatch(r"negative \(\d+\)", refusals[0]) and re.fullmatch(r"positive \(\d+\)", wishes[0])
    rec = load(tiny_model)
    for row, intent in ((refusals, "negative"), (wishes, "positive")):
        texts = [line.split("\t")[0] for line in NEUTRAL.read_text(encoding="utf-8").splitlines() if line.endswith(f"\t{intent}")]
        prompt = torch.from_numpy(rec.prompt_vectors(texts))
        meant = rec.model.meaning_reader(prompt)
        left = f"{(1 - meant).prod(1).mean():.2f}" if intent == "negative" else ""
        assert row[1:] == [f"{meant.sum(1).mean():.2f}", f"{(meant > 0.5).any(1).float().mean():.2f}", left]
        assert meant.std() > 0
