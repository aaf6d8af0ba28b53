"""RecBole's own models: its recipe, our evaluation sets; figures agree with RecBole's own evaluator."""

import json

import numpy as np
import pytest
import tiny
import yaml
from recbole.data.utils import create_samplers, get_dataloader

from recbole_dpr import compat

compat.apply()

from recbole_dpr import run_dpr  # noqa: E402
from recbole_dpr.config import make_config  # noqa: E402
from recbole_dpr.data.dataset import TEST, build_sequences  # noqa: E402
from recbole_dpr.errors import UserError  # noqa: E402
from recbole_dpr.evaluation.evaluator import Evaluator, PromptedQueries  # noqa: E402
from recbole_dpr.evaluation.queries import PROTOCOL_KEYS, build_queries  # noqa: E402
from recbole_dpr.materials import prepare_queries, read_dataset  # noqa: E402
from recbole_dpr.zoo import RecBoleModel, dataset_class  # noqa: E402

SEQUENTIAL = ("SASRec", "GRU4Rec", "BERT4Rec", "NARM", "Caser")
GENERAL = ("Pop", "BPR", "ItemKNN", "EASE", "LightGCN")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder)
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def run(data, model, folder, **more):
    return run_dpr(model, "tiny", config_dict=tiny.settings(data, model, output_dir=str(folder), **more))


def built(data, model, folder, **more):
    """A trained RecBoleModel, its config, its sequences and its unbuilt dataset."""
    config = make_config(model, "tiny", (), tiny.settings(data, model, epochs=1, **more))
    dataset = read_dataset(config, dataset_class(config))
    sequences = build_sequences(dataset)
    zoo_model = RecBoleModel(config, dataset, sequences, folder)
    zoo_model.train()
    return zoo_model, config, sequences, dataset


def seq_metrics(zoo_model, config, sequences):
    seq = prepare_queries(config, sequences).test[0]
    assert seq.name == "SEQ"
    return Evaluator(sequences, config).mean(seq, zoo_model.score)


# NeuMF and FM have no full_sort_predict; FM is a context-aware model, LightGCN a graph, Pop and the like train without epochs
@pytest.mark.parametrize("model", [*SEQUENTIAL, *GENERAL, "NeuMF", "FM"])
def test_a_run_measures_the_three_tasks_and_writes_its_folder(data, tmp_path, model):
    folder = tmp_path / "run"
    result = run(data, model, folder, epochs=1)
    rows = {(r["method"], r["task"], r["prompt"], r["window"]): r for r in result["results"]}
    assert {key[:2] for key in rows} == {
        *((model, task) for task in ("SEQ", "POS", "NEG")),
        *((f"Filter {model}", task) for task in ("POS", "NEG")),
    }
    for (method, *rest), row in rows.items():
        assert row["queries"] > 0
        assert set(row["metrics"]) == {"NDCG@10", "NDCG@20", "Recall@10", "Recall@20"}
        assert all(0 <= value <= 1 for value in row["metrics"].values())
        if method != model:  # what the filter takes away stands above the targets or below, and is no target itself
            assert all(value >= rows[model, *rest]["metrics"][name] for name, value in row["metrics"].items())
    assert json.loads((folder / "metrics.json").read_text())["results"] == result["results"]
    assert f"Filter {model}" in (folder / "table.md").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == model
    assert (folder / "checkpoints" / f"{model}.pth").is_file()
    assert (folder / "curves.png").is_file() == (model not in ("Pop", "ItemKNN", "EASE"))
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("model", SEQUENTIAL)
def test_seq_equals_recboles_evaluator_for_sequential_models(data, tmp_path, model):
    zoo_model, config, sequences, _ = built(data, model, tmp_path, mask_history=False, eval_positions="all")
    loader = get_dataloader(config, "test")(config, zoo_model.test_set, None, shuffle=False)
    theirs = zoo_model.trainer.evaluate(loader, load_best_model=False)
    ours = seq_metrics(zoo_model, config, sequences)
    assert {name.lower(): pytest.approx(value, abs=5.1e-5) for name, value in ours.items()} == dict(theirs)


@pytest.mark.parametrize("model", ["BPR", "EASE", "NeuMF"])
def test_seq_equals_recboles_evaluator_for_general_models(data, tmp_path, model):
    # with one test item per user RecBole's users are our queries, and it masks what a user had before
    leave_one_out = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    zoo_model, config, sequences, dataset = built(data, model, tmp_path, eval_args=leave_one_out)
    parts = [zoo_model.train_data._dataset, zoo_model.valid_data._dataset, zoo_model.test_set]
    loader = get_dataloader(config, "test")(config, parts[2], create_samplers(config, dataset, parts)[2], shuffle=False)
    theirs = zoo_model.trainer.evaluate(loader, load_best_model=False)
    ours = seq_metrics(zoo_model, config, sequences)
    assert {name.lower(): pytest.approx(value, abs=5.1e-5) for name, value in ours.items()} == dict(theirs)


def test_prompt_kinds_share_rankings_and_keep_their_own_queries(data, tmp_path):
    zoo_model, config, sequences, _ = built(data, "SASRec", tmp_path)
    evaluator = Evaluator(sequences, config)
    test = prepare_queries(config, sequences).test
    some = np.arange(0, len(test[1]), 3)
    some = PromptedQueries(test[1].queries.take(some), "tag", test[1].prompt[some], test[1].own_phrase[some])
    whole, part = evaluator.rows("SASRec", zoo_model, [test[1], some])
    assert (whole["queries"], part["queries"]) == (len(test[1]), len(some))
    assert part["metrics"] == pytest.approx(evaluator.mean(some, zoo_model.score))
    assert part["metrics"] != whole["metrics"] == pytest.approx(evaluator.mean(test[1], zoo_model.score))


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_the_evaluation_set_is_that_of_a_dpr_run(data, model):
    sets = []
    for name in ("DPR_SASRec", model):
        config = make_config(name, "tiny", (), tiny.settings(data, name))
        sequences = build_sequences(read_dataset(config, dataset_class(config)))
        sets.append([sequences.stats(), *build_queries(sequences, config, TEST)])
        protocol = {key: config[key] for key in PROTOCOL_KEYS}
    assert protocol == {key: make_config("DPR_SASRec", "tiny", (), tiny.settings(data))[key] for key in PROTOCOL_KEYS}
    assert sets[0][0] == sets[1][0]
    for ours, theirs in zip(sets[0][1:], sets[1][1:], strict=True):
        for field in ("position", "targets", "category", "spoken_of"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


def test_the_recipe_is_recboles_own():
    bpr, sasrec, core = (make_config(model, "ml-100k") for model in ("BPR", "SASRec", "CORE"))
    for config in (bpr, sasrec, core):
        assert (config["train_batch_size"], config["learning_rate"], config["stopping_step"]) == (2048, 0.001, 10)
        assert (config["epochs"], config["valid_metric"]) == (300, "NDCG@10")
    assert (bpr["train_neg_sample_args"]["distribution"], bpr["repeatable"]) == ("uniform", False)
    assert (sasrec["train_neg_sample_args"]["distribution"], sasrec["repeatable"]) == ("none", True)
    assert (sasrec["hidden_dropout_prob"], sasrec["MAX_ITEM_LIST_LENGTH"]) == (0.5, 50)
    assert core["temperature"] == 0.07  # a key of ours too
    assert make_config("BPR", "ml-100k", (), {"learning_rate": 0.01})["learning_rate"] == 0.01


@pytest.mark.parametrize("key", ["stages", "stage1", "stage1.epochs", "prompt_share"])
def test_keys_of_dpr_training_are_refused(key):
    with pytest.raises(UserError, match=f"key '{key}' is for DPR models"):
        make_config("SASRec", "ml-100k", (), {key: 1})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("S3Rec", "train_stage=pretrain"),
        ("RaCT", "train_stage=actor_pretrain"),
        ("DIEN", "negative histories"),
        ("CKE", r"\[tiny\.kg\] not found"),
        ("SASRecF", "load_col"),  # its feature field is named after ml-100k's
    ],
)
def test_a_model_that_cannot_work_says_so_in_one_line(data, tmp_path, model, said):
    with pytest.raises(UserError, match=said) as error:
        run(data, model, tmp_path / "run", epochs=1)
    assert "\n" not in str(error.value)


def test_resume_goes_on_from_the_checkpoint(data, tmp_path):
    folder = tmp_path / "run"
    first = run(data, "GRU4Rec", folder, epochs=1)
    assert [row["epoch"] for row in first["history"]] == [0]
    second = run_dpr("GRU4Rec", "tiny", config_dict={"resume": str(folder), "epochs": 2})
    assert [row["epoch"] for row in second["history"]] == [1]
    done = run_dpr("GRU4Rec", "tiny", config_dict={"resume": str(folder), "epochs": 2})
    assert done["history"] in ([], second["history"])  # empty where the second epoch was the best
    assert done["results"] == second["results"]


def test_how_the_training_ended(data, tmp_path):
    """A cap of two epochs; early stopping at the first epoch that is no better; a model that only counts."""
    capped = run(data, "GRU4Rec", tmp_path / "capped", epochs=2)
    stopped = run(data, "GRU4Rec", tmp_path / "stopped", epochs=20, stopping_step=0, learning_rate=1.0)
    assert capped["training"] == {"epochs": 2, "cap": 2, "stopped_early": False}
    assert stopped["training"] == {"epochs": len(stopped["history"]), "cap": 20, "stopped_early": True}
    assert len(stopped["history"]) < 20
    assert run(data, "Pop", tmp_path / "pop")["training"] is None


def test_the_same_seed_gives_the_same_figures(data, tmp_path):
    a, b = (run(data, "NARM", tmp_path / name, epochs=1) for name in "ab")
    assert a["results"] == b["results"]


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    folder = tmp_path / "run"
    run(data, "BPR", folder, epochs=1)
    (folder / "checkpoints" / "BPR.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="BPR.pth is damaged"):
        run_dpr("BPR", "tiny", config_dict={"resume": str(folder), "epochs": 2})
