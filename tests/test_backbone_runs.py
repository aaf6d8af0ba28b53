"""Whole runs over backbones: every sequential model of RecBole tried; resumed, taken over, loaded again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from backbone_table import outcome, row
from recbole_dpr import load, run_dpr
from recbole_dpr.errors import UserError
from recbole_dpr.model.backbones import sequential_models
from recbole_dpr.train.trainer import StageTrainer

TABLE = Path(__file__).parent.parent / "docs" / "backbones.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_texts(tmp_path_factory.mktemp("data"))
    tiny.write(folder)
    return folder


@pytest.mark.parametrize("name", sequential_models())
def test_the_table_says_what_happens(folder, name):
    """All three stages, load, a prompted answer; or one line that says why not."""
    assert row(name, *outcome(name, folder)) in TABLE.read_text().splitlines()


def test_the_table_is_complete():
    names = [line.split("|")[1].strip() for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert names == sequential_models()


@pytest.mark.parametrize("name", ["GRU4Rec", "BERT4Rec", "NARM"])
def test_resumed_is_bit_for_bit_uninterrupted(folder, tmp_path, monkeypatch, name):
    """Cut after the first epoch of stage 1, in the middle of its draws of histories and masks."""
    model, real = f"DPR_{name}", StageTrainer._after_epoch
    settings = tiny.settings(folder, model, item_texts=str(folder), train_batch_size=300, prefix_batch_size=100, epochs=2)
    whole = run_dpr(model, "tiny", config_dict={**settings, "output_dir": str(tmp_path / "whole")})

    def die(self, epoch, score):
        real(self, epoch, score)
        raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_after_epoch", die)
    with pytest.raises(KeyboardInterrupt):
        run_dpr(model, "tiny", config_dict={**settings, "output_dir": str(tmp_path / "cut")})
    monkeypatch.undo()
    torch.manual_seed(99)  # what ran before in the process must not matter
    resumed = run_dpr(model, "tiny", config_dict={"resume": str(tmp_path / "cut")})
    assert resumed["history"] == whole["history"] and resumed["results"] == whole["results"]
    first, second = (load_file(Path(run["folder"]) / "model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_stage_1_learns(folder):
    """More likely targets after five epochs than after one, for each way of training."""
    for name in ("GRU4Rec", "BERT4Rec", "NARM"):
        model = f"DPR_{name}"
        stage = {"epochs": 5, "learning_rate": 0.01, "stopping_step": 5, "valid_tasks": ["SEQ"], "schedule": "constant"}
        sizes = {"train_batch_size": 300, "prefix_batch_size": 100}
        history = run_dpr(model, "tiny", config_dict=tiny.settings(folder, model, item_texts=None, stages=[1], stage1=stage, **sizes))["history"]
        assert len(history) == 5 and history[-1]["loss"] < history[0]["loss"] - 0.02


def test_backbone_as_a_key(folder, tmp_path):
    """--model=DPR --backbone=NARM, in a file or on the command line, is DPR_NARM; its config.yaml repeats it."""
    file = tmp_path / "narm.yaml"
    file.write_text(yaml.safe_dump({**tiny.settings(folder, "DPR_NARM", item_texts=None, stages=[1, 2], epochs=1), "backbone": "NARM"}))
    first = run_dpr("DPR", "tiny", [file], {"output_dir": str(tmp_path / "a")})
    assert first["model"] == "DPR_NARM" and "DPR_NARM" in {r["method"] for r in first["results"]}
    again = run_dpr("DPR", "tiny", [tmp_path / "a" / "config.yaml"], {"output_dir": str(tmp_path / "b"), "backbone": "NARM"})
    assert again["results"] == first["results"]
    done = run_dpr("DPR", "tiny", (), {"resume": str(tmp_path / "a"), "backbone": "NARM"})
    assert done["results"] == first["results"]


def test_stage_1_is_taken_over_from_the_same_backbone_only(folder, tmp_path):
    """SASRec, GRU4Rec and NARM all have an item_embedding: a part of the weights is not enough."""
    settings = lambda name, **more: tiny.settings(folder, f"DPR_{name}", item_texts=None, stages=[1], epochs=1, **more)  # noqa: E731
    first = run_dpr("DPR_NARM", "tiny", config_dict=settings("NARM", output_dir=str(tmp_path / "narm")))
    second = run_dpr("DPR_NARM", "tiny", config_dict=settings("NARM", output_dir=str(tmp_path / "same"), stage1_checkpoint=first["folder"]))
    assert second["results"] == first["results"]
    for name, more in (("GRU4Rec", {}), ("NARM", {"hidden_size": 8})):
        with pytest.raises(UserError, match="another backbone"):
            run_dpr(f"DPR_{name}", "tiny", config_dict=settings(name, output_dir=str(tmp_path / name), stage1_checkpoint=first["folder"], **more))


@pytest.mark.parametrize("name", ["BERT4Rec", "CORE"])
@pytest.mark.filterwarnings("ignore:1 items")
def test_load_answers_as_the_dot_product(folder, tmp_path, name):
    model = f"DPR_{name}"
    run_dpr(model, "tiny", config_dict=tiny.settings(folder, model, item_texts=str(folder), output_dir=str(tmp_path / "out"), epochs=1))
    rec = load(tmp_path / "out")
    for history in (["i3", "i14", "i15"], [f"i{n}" for n in range(20)], [], ["unknown"]):
        for prompt in (None, "a western, but no horror"):
            found = rec.recommend(history, prompt, k=len(rec.items))
            scores = rec.item_embeddings @ rec.user_embedding(history, prompt)
            assert np.isfinite(scores).all()
            assert found.items == [rec.items[i] for i in np.argsort(-scores, kind="stable") if rec.items[i] not in history]
