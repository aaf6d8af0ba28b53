"""Golden figures on ml-100k (inside RecBole's wheel): a change that costs accuracy fails here."""

import pytest

from recbole_dpr import run_dpr

SETTINGS = {
    **{"item_texts": None, "show_progress": False, "seed": 2026},
    "stage2": {"epochs": 3},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return run_dpr("DPR_SASRec", "ml-100k", config_dict={**SETTINGS, "output_dir": str(folder / "run")})


@pytest.fixture(scope="module")
def ndcg(result):
    return {(r["method"], r["task"], r["window"]): r["metrics"]["NDCG@10"] for r in result["results"]}


def test_dataset(result):
    """The file's own counts: 943 users; 1,617 of 1,682 items are seen in training."""
    assert result["dataset_stats"] == {"users": 943, "items": 1617, "interactions": 99921, "train": 81008, "valid": 9463, "test": 9450}


def test_queries(result):
    counts = {(r["task"], r["window"]): r["queries"] for r in result["results"] if r["method"] == "Base"}
    assert counts["SEQ", None] == 943
    assert counts["POS", 3] == 693 and counts["NEG", 3] == 630


def test_base(ndcg):
    assert 0.09 < ndcg["Base", "SEQ", None] < 0.12


def test_prompts_steer(ndcg):
    assert ndcg["DPR_SASRec", "POS", "avg"] > 2 * ndcg["Base", "POS", "avg"]
    assert ndcg["DPR_SASRec", "POS", "avg"] > 0.95 * ndcg["Filter", "POS", "avg"]
    assert ndcg["DPR_SASRec", "NEG", "avg"] > ndcg["Base", "NEG", "avg"]


def test_unprompted_is_the_backbone_exactly(ndcg):
    assert ndcg["DPR_SASRec", "SEQ", None] == ndcg["Base", "SEQ", None]
