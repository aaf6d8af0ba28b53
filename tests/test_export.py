"""Vectors for other servers: docs/serving.md holds as it stands, and the ONNX file answers as the model does."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from recbole_dpr import load
from recbole_dpr.config import make_config
from recbole_dpr.errors import UserError
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.serving.recommender import Recommender

BLOCKS = re.findall("```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "serving.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("block", "needs"), [(0, ()), (1, ("faiss",)), (2, ("onnxruntime", "onnx", "onnxscript"))])
def test_the_page_on_serving_holds(tiny_model, tmp_path, monkeypatch, block, needs):
    for package in needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"FOLDER": tiny_model}
    exec(BLOCKS[0], names)
    if block:
        exec(BLOCKS[block], names)


@pytest.fixture(scope="module")
def untrained(tiny_model):
    """A Recommender over a model of a given class, its weights as drawn."""

    def make(name):
        trained = load(tiny_model)
        config = make_config(name, "tiny", (), tiny.settings(tiny_model.parent, name))
        config["prompt_size"], config["n_categories"] = trained.encoder.dim, len(tiny.CATEGORIES)
        torch.manual_seed(0)
        model = promptable(name)(config, ItemVocabulary(len(trained.items) + 1, config))
        for parameter in model.parameters():  # the fusion starts at zero, which would hide it
            torch.nn.init.normal_(parameter, std=0.1)
        for value in (*model.meaning_reader.buffers(), model.category_reader):  # nothing is meant and all is named alike without
            torch.nn.init.normal_(value)
        return Recommender(model, trained.items, trained.titles, trained.categories, trained.encoder, config["MAX_ITEM_LIST_LENGTH"])

    return make


@pytest.mark.parametrize(("name", "most", "weight"), [("DPR_SASRec", 10, 0.125), ("DPR_SASRec", 10, 0.0), ("DPR_GRU4Rec", 10, 0.125), ("DPR_BERT4Rec", 9, 0.125)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of torch's exporter
def test_onnx_answers_as_the_model(untrained, tmp_path, name, most, weight):
    """Batches, long and short histories, a new user, two clauses of one user, strengths: equal vectors."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from recbole_dpr.serving.export import export_user_tower

    rec = untrained(name)
    rec.model.unprompted_weight = weight
    export_user_tower(rec, tmp_path / "tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    texts = ["a western", "horror", "a drama"]
    prompt = rec.encoder.encode(texts, cached=False)
    for lengths in ([3, 0, 7, 10], [1], [10, 10]):
        histories = [rec.items[start : start + n] for start, n in enumerate(lengths)]
        item_seq = np.zeros((len(lengths), min(most, max(lengths))), dtype=np.int64)
        for row, history in enumerate(histories):
            item_seq[row, : len(history)] = [rec.items.index(item) + 1 for item in history[-most:]]
        asked = ["a western, but no horror", "a drama"] + [None] * len(lengths)
        last = len(lengths) - 1
        found = session.run(None, {
            **{"item_seq": item_seq, "length": np.minimum(lengths, most), "prompt": prompt, "intent": np.array([0, 1, 0])},
            **{"strength": np.array([1, 2, 0.5 if last else 0], dtype=np.float32), "owner": np.array([0, 0, last and 1])},
        })[0]  # fmt: skip
        own = rec.user_embeddings(histories, asked[: len(lengths)], [[1, 2], 0.5, 1, 1][: len(lengths)])
        np.testing.assert_allclose(found, own, atol=2e-2 if rec.encoder.dtype.itemsize == 2 else 1e-4)
        assert len(np.unique(found.round(3), axis=0)) == len(lengths)


def test_what_cannot_be_exported_is_one_clear_line(tiny_model, tmp_path, monkeypatch):
    from recbole_dpr.serving import export

    rec = load(tiny_model)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"\[export\]"):
        export.export_user_tower(rec, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
