"""Tests use the default encoder from its wheel and never ask a hub."""

import os

import pytest
import torch

import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# with pytest -n the processes share the cores: more threads than cores make small models many times slower
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of what tests start


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
