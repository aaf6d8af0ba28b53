"""recbole-dpr tune: params files, every wrong input in one line, and real searches on the tiny dataset.

A killed driver and a cluster that was started apart take minutes: tests/ray_checks.py.
"""

import csv
import json
import math
import pickle
import shutil
import socket
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml

from recbole_dpr import run_dpr
from recbole_dpr.cli import main
from recbole_dpr.errors import UserError
from recbole_dpr.tuning.space import check_space, read_space

NEEDS_RAY = "Ray is not installed: pip install 'ray[tune]'"


def space_of(folder, text, name="params.txt"):
    (folder / name).write_text(text)
    return read_space(folder / name)


# --- params files


def test_recboles_format(tmp_path):
    """By recbole.trainer.hyper_tuning: blanks between the numbers count for nothing, loguniform takes exponents of e."""
    space = space_of(
        tmp_path,
        "learning_rate loguniform -8, 0\n\n# a comment\nhidden_size choice [64, 128]\nloss_type choice ['BPR','CE']\n"
        "mlp choice [(64,32),[128]]\ndropout uniform 0.1,0.5\nn_layers quniform 1,4,1\nweight quniform 0.1,0.5,0.1\n",
    )
    assert space == {
        "learning_rate": {"loguniform": [pytest.approx(0.00033546263), 1.0]},
        "hidden_size": {"choice": [64, 128]},
        "loss_type": {"choice": ["BPR", "CE"]},
        "mlp": {"choice": [[64, 32], [128]]},
        "dropout": {"uniform": [0.1, 0.5]},
        "n_layers": {"choice": [1, 2, 3, 4]},
        "weight": {"choice": [0.1, 0.2, 0.3, 0.4, 0.5]},
    }
    assert all(type(value) is int for value in space["n_layers"]["choice"])


def test_yaml_takes_the_values_themselves(tmp_path):
    text = "learning_rate: {loguniform: [1e-4, 1e-2]}\nstage3.epochs: {quniform: [2, 7, 2]}\ntwo_towers: {choice: [true, false]}\n"
    assert space_of(tmp_path, text, "params.yaml") == {
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "stage3.epochs": {"choice": [2, 4, 6]},
        "two_towers": {"choice": [True, False]},
    }


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "", "is empty"),
        ("p.yaml", "", "is empty"),
        ("p.txt", "# nothing but this\n", "is empty"),
        ("p.txt", "hidden_size [64,128]\n", "line 1"),
        ("p.txt", "a choice [1]\na choice [2]\n", "twice"),
        ("p.txt", "learning_rate lognormal 0,1\n", "loguniform"),
        ("p.txt", "learning_rate uniform 0.1\n", "2 finite numbers"),
        ("p.txt", "learning_rate uniform a,b\n", "cannot read"),
        ("p.txt", "learning_rate loguniform 0,-8\n", "lower end"),
        ("p.txt", "learning_rate loguniform -8,9999\n", "finite"),
        ("p.txt", "n_layers quniform 1,4,0\n", "above 0"),
        ("p.txt", "n_layers quniform 5,6,4\n", "no multiple"),
        ("p.txt", "n_layers choice []\n", "a list"),
        ("p.txt", "n_layers choice [{1, 2}]\n", "lists of them"),
        ("p.txt", "n_layers choice __import__('os').mkdir('evaluated')\n", "cannot read"),
        ("p.yaml", "learning_rate: {loguniform: [-8, 0]}\n", "exponents of e"),
        ("p.yaml", "learning_rate: {uniform: 0.1}\n", "2 finite numbers"),
        ("p.yaml", "learning_rate: [0.1, 0.2]\n", "one distribution"),
        ("p.yaml", "epochs: 3\n", "one distribution"),
        ("p.yaml", "a: [1, 2\nb: }", "not YAML"),
    ],
)
def test_wrong_params_files(tmp_path, monkeypatch, name, text, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        space_of(tmp_path, text, name)
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize(
    ("model", "key", "values", "said"),
    [
        ("DPR_SASRec", "hiden_size", [64], "hidden_size"),
        ("DPR_SASRec", "windows", [[3]], "compared on"),  # the yardstick
        ("DPR_SASRec", "stage3.valid_tasks", [["SEQ"]], "compared on"),
        ("DPR_SASRec", "seed", [1, 2], "compared on"),
        ("DPR_SASRec", "prompt_encoder", ["a"], "compared on"),  # embedded once for all trials
        ("DPR_SASRec", "MAX_ITEM_LIST_LENGTH", [10, 20], "compared on"),
        ("DPR_SASRec", "learning_rate", [0.1], "stage1.learning_rate"),  # which a DPR model does not read
        ("DPR_SASRec", "hidden_size", [16, 17], "hidden_size=17"),
        ("DPR_SASRec", "stage2.epochs", [1, -1], "stage2.epochs=-1"),
        ("BPR", "stage1.epochs", [1], "unknown key to search"),
        ("BPR", "hidden_size", [16], "embedding_size"),
    ],
)
def test_keys_that_cannot_be_searched(tmp_path, model, key, values, said):
    tiny.write(tmp_path)
    with pytest.raises(UserError, match=said):
        check_space({key: {"choice": values}}, model, "tiny", tiny.settings(tmp_path, model))


# --- what is reported


def trainer(stage, epoch, epochs, cur_step=0):
    row = {"stage": stage, "epoch": epoch, "loss": 1.0, "score": 0.25}
    return SimpleNamespace(history=[row], epochs=epochs, cur_step=cur_step, stopping_step=2, best_valid_score=0.5)


def test_progress_and_score():
    """Stages done count up to the end of a stage even where it stops early; the score is the best of the stage."""
    metrics_of = pytest.importorskip("recbole_dpr.tuning.trial", reason=NEEDS_RAY).metrics_of
    told = metrics_of(trainer(2, 0, 4), [1, 2, 3])
    assert (told["stages_done"], told["score"], told["epoch_score"], told["epoch"]) == (1.25, 0.5, 0.25, 1)
    assert metrics_of(trainer(1, 3, 4), [1, 2, 3])["stages_done"] == 1
    assert metrics_of(trainer(3, 0, 2), [1, 3])["stages_done"] == 1.5
    assert metrics_of(trainer(2, 1, 10, cur_step=2), [1, 2, 3])["stages_done"] == 1.2
    assert metrics_of(trainer(2, 1, 10, cur_step=3), [1, 2, 3])["stages_done"] == 2  # stopped early


# --- stopping


def test_a_restored_scheduler_knows_what_was_reported_before(tmp_path):
    """Scores .3 and .1 after stage 1, so .15 is below the middle, .2: stopped, and it would not be by one that remembers nothing."""
    search = pytest.importorskip("recbole_dpr.tuning.search", reason=NEEDS_RAY)

    def asha():
        return search._ASHA(time_attr="stages_done", metric="score", mode="max", max_t=3, grace_period=1, reduction_factor=2, stop_last_trials=False)

    def trial(name, *reports):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"stages_done": done, "score": score}) + "\n" for done, score in reports]
        (tmp_path / name / "result.json").write_text("".join(lines) + '{"stages_do')  # the driver was killed while it wrote
        return SimpleNamespace(trial_id=name, path=str(tmp_path / name), has_reported_at_least_once=True)

    restored, fresh = asha(), asha()
    for scheduler, known in ((restored, [trial("a", (0.5, 0.2), (1, 0.3), (2, 0.9)), trial("b", (1, 0.1))]), (fresh, [])):
        newcomer = SimpleNamespace(trial_id="new", has_reported_at_least_once=False)
        for added in [*known, newcomer]:
            scheduler.on_trial_add(None, added)
        decision = scheduler.on_trial_result(None, newcomer, {"stages_done": 1, "score": 0.15})
        assert decision == ("STOP" if known else "CONTINUE")


# --- trials, without Ray's processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny dataset with texts, and the settings of short runs on it."""
    folder = tiny.write_texts(tmp_path_factory.mktemp("data"))
    tiny.write(folder)

    def settings(model, **more):
        stages = {f"stage{n}": {"epochs": 2, "stopping_step": 5} for n in (1, 2, 3)} if model.startswith("DPR") else {"epochs": 3}
        texts = {"item_texts": str(folder), "train_batch_size": 500} if model.startswith("DPR") else {}
        return tiny.settings(folder, model, **texts, **stages, **more)

    return folder, settings


class Cut(Exception):
    pass


@pytest.mark.parametrize("model", ["DPR_SASRec", "SASRec", "BPR"])
def test_a_trial_reads_no_data_and_goes_on_from_its_checkpoint(data, tmp_path, model):
    """Its data come from the driver: they are gone from disk here. Cut after its second epoch, it ends where the uncut one does."""
    search = pytest.importorskip("recbole_dpr.tuning.search", reason=NEEDS_RAY)
    from recbole_dpr.config import make_config
    from recbole_dpr.tuning.trial import train

    shutil.copytree(data[0], tmp_path / "data")
    settings = {**data[1](model), "data_path": str(tmp_path / "data")}
    wanted = search.Search(model, "tiny", settings, {}, 1)
    task = search._prepared(wanted, make_config(model, "tiny", (), settings), False)
    stored = pickle.dumps(task)  # as Ray does
    shutil.rmtree(tmp_path / "data" / "tiny")
    if model.startswith("DPR"):
        assert task.data.test == [] and task.data.valid

    whole, cut = [], []
    run = run_dpr(model, "tiny", config_dict=data[1](model, output_dir=str(tmp_path / "run"), gpu_id=""))
    train({}, pickle.loads(stored), tmp_path / "whole", lambda told, state: whole.append(told))
    assert [row["epoch_score"] for row in whole] == [row["score"] for row in run["history"]]  # as run_dpr trains

    def report(told, state):
        cut.append(told)
        if len(cut) == 2:
            shutil.copytree(state, tmp_path / "resumed" / "checkpoints")
            raise Cut

    with pytest.raises((Cut, UserError)):
        train({}, pickle.loads(stored), tmp_path / "cut", report)
    train({}, pickle.loads(stored), tmp_path / "resumed", lambda told, state: cut.append(told))
    # RecBole keeps its best epoch alone, so what came after it is trained twice
    assert list(dict.fromkeys((row["stage"], row["epoch"]) for row in cut)) == [(row["stage"], row["epoch"]) for row in whole]
    if model.startswith("DPR"):
        assert [row["score"] for row in cut] == [row["score"] for row in whole]


# --- a search


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """A finished search of 2 trials, its folder and what `search` gave."""
    search = pytest.importorskip("recbole_dpr.tuning.search", reason=NEEDS_RAY)
    folder = tmp_path_factory.mktemp("search")
    (folder / "params").write_text("stage3.learning_rate loguniform -8,-4\nhidden_size choice [16,32]\n")
    result = search.search("DPR_SASRec", "tiny", folder / "params", 2, (), data[1]("DPR_SASRec", epochs=1, output_dir=str(folder / "out")))
    return folder / "out", result


def test_a_search_writes_its_folder(found):
    folder, result = found
    assert {"search.yaml", "best.yaml", "trials.csv", "trials.md", "trials.png"} <= {path.name for path in folder.iterdir()}
    with open(folder / "trials.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1"]
    for row in rows:
        assert row["hidden_size"] in ("16", "32") and math.exp(-8) <= float(row["stage3.learning_rate"]) <= math.exp(-4)
        assert 0 <= float(row["score"]) <= 1 and not row["error"]
    ended = [row for row in rows if row["stage"] == "3"]
    assert result["score"] == max(float(row["score"]) for row in ended)  # the first trial is never stopped


def test_the_best_trials_config_gives_its_score(found, tmp_path):
    """run_dpr with best.yaml: the same validation score, and the drawn values."""
    folder, result = found
    kept = yaml.safe_load((folder / "best.yaml").read_text())
    assert kept["hidden_size"] == result["best"]["hidden_size"]
    assert kept["stage3"]["learning_rate"] == result["best"]["stage3.learning_rate"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gave the trial one processor, and sums depend on how many share them
    try:
        run = run_dpr("DPR_SASRec", "tiny", [folder / "best.yaml"], {"output_dir": str(tmp_path / "run")})
    finally:
        torch.set_num_threads(threads)
    assert max(row["score"] for row in run["history"] if row["stage"] == 3) == pytest.approx(result["score"], abs=1e-6)


def test_no_test_figures_in_a_search(found):
    told = [path.read_text() for path in (found[0] / "ray").glob("trial_*/result.json")]
    assert told and not any("Recall" in text or "Filter" in text for text in told)
    assert not list(found[0].rglob("metrics.json"))


# --- wrong inputs, through the command line


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    """A working directory, and the arguments of a search."""
    pytest.importorskip("ray.tune", reason=NEEDS_RAY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data[1]("BPR")))
    (tmp_path / "params").write_text("learning_rate loguniform -8,-4\n")
    return ["--model=BPR", "--dataset=tiny", "--config_files=tiny.yaml", "--params=params", "--trials=1"]


def fails(capsys, *arguments):
    """Run the command; it has to end with code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--model=BPRR", "did you mean 'BPR'"),
        ("--params=none", "params='none'"),
        ("--trials=0", "trials=0"),
        ("--cpus_per_trial=0", "cpus_per_trial=0"),
        ("--gpus_per_trial=1.5", "gpus_per_trial=1.5"),
        ("--max_concurrent_trials=some", "max_concurrent_trials"),
        ("--grace_period=-1", "grace_period=-1"),
        ("--address=nowhere", "host:port"),
        ("--address=ray://127.0.0.1:10001", "Ray Client"),
        ("--resume=none", "search.yaml"),
    ],
)
def test_wrong_inputs(here, capsys, argument, said):
    usual = [a for a in here if a.partition("=")[0] != argument.partition("=")[0]]
    assert said in fails(capsys, *([] if "resume" in argument else usual), argument)


def test_what_a_search_needs(here, capsys):
    assert "--params=" in fails(capsys, "--model=BPR", "--trials=1")
    assert "--trials=" in fails(capsys, "--model=BPR", "--params=params")
    assert "search.yaml" in fails(capsys, "--resume=out", "--trials=3")


def test_a_second_search_does_not_overwrite_the_first(here, found, capsys):
    assert "--resume=" in fails(capsys, *here, f"--output_dir={found[0]}")


def test_an_address_where_nothing_listens(here, capsys):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        assert "no Ray cluster there" in fails(capsys, *here, f"--address=127.0.0.1:{taken.getsockname()[1]}")


def test_an_address_where_something_else_listens(here, capsys, monkeypatch):
    monkeypatch.setattr("recbole_dpr.tuning.search._ANSWERING", 2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "no Ray cluster answers" in fails(capsys, *here, f"--address=127.0.0.1:{other.getsockname()[1]}")


def test_more_than_the_cluster_has(monkeypatch):
    search = pytest.importorskip("recbole_dpr.tuning.search", reason=NEEDS_RAY)
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    wanted = {"model": "BPR", "dataset": "tiny", "settings": {}, "space": {}, "trials": 1}
    assert search._resources(search.Search(**wanted)) == {"cpu": 1, "gpu": 1}  # a GPU each where there are any
    assert search._resources(search.Search(**wanted, gpus_per_trial=0.5)) == {"cpu": 1, "gpu": 0.5}
    for more, said in (({"cpus_per_trial": 3}, "cpus_per_trial=3"), ({"gpus_per_trial": 2}, "gpus_per_trial=2")):
        with pytest.raises(UserError, match=said):
            search._resources(search.Search(**wanted, **more))
