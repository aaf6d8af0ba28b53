"""Whole runs on a tiny dataset: what they write, resuming, and every wrong input in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from recbole_dpr import load, run_dpr
from recbole_dpr.cli import main
from recbole_dpr.config import make_config, settings_in_force
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation.queries import build_queries
from recbole_dpr.materials import read_sequences
from recbole_dpr.train import checkpoints
from recbole_dpr.train.trainer import StageTrainer

ROOT = Path(__file__).parent.parent


def settings(folder, **more):
    stages = {f"stage{n}": {"epochs": 2, "stopping_step": 5} for n in (1, 2, 3)}
    return tiny.settings(folder, **{"item_texts": str(folder), "train_batch_size": 500, **stages, **more})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all three stages, and its result."""
    folder = tiny.write_texts(tmp_path_factory.mktemp("run"))
    tiny.write(folder)
    result = run_dpr("DPR_SASRec", "tiny", config_dict=settings(folder, output_dir=str(folder / "out")))
    return folder, result


def test_a_run_writes_what_the_contract_says(finished):
    folder, result = finished
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"metrics.json", "table.md", "config.yaml", "model.safetensors", "model.json", "curves.png"} <= names
    assert not [name for name in names if name.startswith(".")]  # nothing half-written
    kept = json.loads((folder / "out" / "metrics.json").read_text())
    assert kept == {key: value for key, value in result.items() if key != "folder"}
    assert set(kept["dataset_stats"]) == {"users", "items", "interactions", "train", "valid", "test"}
    assert {"data", "prompts", "stage1", "stage2", "stage3", "evaluate"} == set(kept["seconds"])
    rows = {(r["method"], r["task"], r["prompt"], r["window"]) for r in kept["results"]}
    for method in ("DPR_SASRec", "DPR_SASRec/stage2", "Base"):
        assert (method, "SEQ", "none", None) in rows
    for method in ("DPR_SASRec", "DPR_SASRec/stage2", "Base", "Filter", "Text", "Base+text"):
        for task, prompts in (("POS", ("category", "tag", "wish")), ("NEG", ("category", "tag"))):
            assert {(method, task, prompt, window) for prompt in prompts for window in (2, 3, "avg")} <= rows
    assert all(0 <= value <= 1 for r in kept["results"] for value in r["metrics"].values())


def test_all_methods_answer_the_same_queries(finished):
    counts = {}
    for row in finished[1]["results"]:
        counts.setdefault((row["task"], row["prompt"], row["window"]), set()).add(row["queries"])
    assert all(len(sizes) == 1 for sizes in counts.values())


def test_filter_is_at_least_base_on_positive_queries(finished):
    """The target always has the category asked for, so leaving the others out cannot push it down."""
    value = {(r["method"], r["prompt"], r["window"]): r["metrics"]["Recall@20"] for r in finished[1]["results"] if r["task"] == "POS"}
    for window in (2, 3):
        assert value["Filter", "category", window] >= value["Base", "category", window]


def test_the_run_can_be_repeated_from_its_config(finished, tmp_path):
    folder, result = finished
    kept = yaml.safe_load((folder / "out" / "config.yaml").read_text())
    model, dataset = kept.pop("model"), kept.pop("dataset")
    again = run_dpr(model, dataset, [folder / "out" / "config.yaml"], {"output_dir": str(tmp_path / "again")})
    assert again["results"] == result["results"]
    first, second = (load_file(Path(f) / "model.safetensors") for f in (result["folder"], again["folder"]))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves_names_no_folder_of_this_environment():
    """ml-100k lies inside RecBole's wheel: the next environment has it elsewhere."""
    config = make_config("DPR_SASRec", "ml-100k")
    kept = settings_in_force(config)
    assert "data_path" not in kept
    assert make_config(kept.pop("model"), kept.pop("dataset"), (), kept)["data_path"] == config["data_path"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "epoch"), [(1, 0), (2, 0), (2, 1), (3, 0)])
def test_resumed_is_bit_for_bit_uninterrupted(finished, tmp_path, monkeypatch, stage, epoch):
    """Killed after an epoch of a stage and resumed: the same weights and figures as never interrupted."""
    folder, result = finished
    real = StageTrainer._after_epoch

    def die(self, at, score):
        real(self, at, score)
        if (self.stage, at) == (stage, epoch):
            raise Interrupted

    monkeypatch.setattr(StageTrainer, "_after_epoch", die)
    with pytest.raises(Interrupted):
        run_dpr("DPR_SASRec", "tiny", config_dict=settings(folder, output_dir=str(tmp_path / "cut")))
    monkeypatch.setattr(StageTrainer, "_after_epoch", real)
    torch.manual_seed(99)  # what ran before in the process must not matter
    np.random.seed(99)
    resumed = run_dpr("DPR_SASRec", "tiny", config_dict={"resume": str(tmp_path / "cut")})
    assert resumed["results"] == result["results"]
    assert resumed["history"] == result["history"]
    first, second = (load_file(Path(f) / "model.safetensors") for f in (result["folder"], resumed["folder"]))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_killed_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.save(path, {"epoch": 1})

    def half(state, file):
        Path(file).write_bytes(b"half")
        raise Interrupted

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Interrupted):
        checkpoints.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoints.load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["x.pt"]


def test_stage1_of_another_run(finished, tmp_path):
    """The paper's form on the same backbone: Base figures are the other run's."""
    folder, result = finished
    more = {"output_dir": str(tmp_path / "paper"), "stage1_checkpoint": result["folder"], "item_text": False}
    paper = run_dpr("DPR_SASRec", "tiny", config_dict=settings(folder, **more))
    base = [[r for r in run["results"] if r["method"] == "Base"] for run in (result, paper)]
    assert base[0] == base[1]
    assert load_file(tmp_path / "paper" / "model.safetensors")["item_side"].shape[1] == 0


def test_without_texts_stage_3_is_left_out(tmp_path, capsys):
    tiny.write(tmp_path)
    result = run_dpr("DPR_SASRec", "tiny", config_dict=settings(tmp_path, item_texts=None, show_progress=True, epochs=1))
    assert "stage 3 is left out" in capsys.readouterr().out
    assert "stage3" not in result["seconds"]
    assert {r["prompt"] for r in result["results"]} == {"none", "category"}
    assert "DPR_SASRec" in {r["method"] for r in result["results"]}


@pytest.mark.parametrize("keys", [{"prompt_keys": "token"}, {"read_prompts": True}, {"two_towers": False}, {"pos_target": "compliance", "neg_target": "window"}])
def test_other_forms_run(finished, tmp_path, keys):
    folder, result = finished
    more = {"output_dir": str(tmp_path / "out"), "stage1_checkpoint": result["folder"], "epochs": 1, **keys}
    run_dpr("DPR_SASRec", "tiny", config_dict=settings(folder, **more))
    found = load(tmp_path / "out").recommend(["i1", "i2"], "a comedy, but no horror", k=5)
    assert len(found.items) == 5


# --- load and recommend


def test_load_answers_as_the_evaluation_did(finished):
    """Scores of the loaded model = user_embedding . item_embeddings, seen items left out, no dataset at hand."""
    rec = load(finished[0] / "out")
    history = ["i3", "i14", "i15"]
    for prompt in (None, "a western", "a western, but no horror"):
        found = rec.recommend(history, prompt, k=len(rec.items))
        scores = rec.item_embeddings @ rec.user_embedding(history, prompt)
        order = [rec.items[i] for i in np.argsort(-scores) if rec.items[i] not in history]
        assert found.items == order
        assert found.titles[0] == f"Film number {found.items[0][1:]}"
    assert found.intents == ["positive", "negative"]


def test_batch_equals_one_by_one(finished):
    rec = load(finished[0] / "out")
    histories, prompts = [["i1"], [], ["i2"] * 30, ["i5", "i6"]], ["a comedy", "a drama", None, ""]
    for found, history, prompt in zip(rec.recommend_batch(histories, prompts, k=5), histories, prompts):
        alone = rec.recommend(history, prompt, k=5)
        assert found.items == alone.items
        np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["", "   ", "🎬", "x " * 5000, "فيلم كوميدي بدون رعب", "<b>comedy</b>", None])
@pytest.mark.parametrize("history", [[], ["i1", "i2"], ["unknown"]])
@pytest.mark.filterwarnings("ignore:1 items", "ignore:a prompt of")
def test_odd_requests_are_answered(finished, history, prompt):
    found = load(finished[0] / "out").recommend(history, prompt, k=3)
    assert len(found.items) == 3
    assert np.isfinite(found.scores).all()


def test_unknown_items_are_skipped_with_a_warning(finished):
    rec = load(finished[0] / "out")
    with pytest.warns(UserWarning, match="no-such-item"):
        found = rec.recommend(["i1", "no-such-item"], k=3)
    assert found.items == rec.recommend(["i1"], k=3).items


@pytest.mark.parametrize("k", [0, -1, 2.5, "3"])
def test_bad_k(finished, k):
    with pytest.raises(UserError, match="k="):
        load(finished[0] / "out").recommend(["i1"], k=k)


# --- wrong inputs, through the command line


def fails(capsys, *arguments):
    """Run the command; it has to end with code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(["run", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the tiny dataset, and the arguments that use it."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path, item_texts=None, epochs=1)))
    return tmp_path, ["--model=DPR_SASRec", "--dataset=tiny", f"--config_files={config}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=DPR_SASRek"], "DPR_SASRec"),
        (["--dataset=no-such"], "--data_path="),
        (["--config_files=none.yaml"], "none.yaml"),
        (["--learning_rte=1"], "learning_rate"),
        (["--neg_target=all"], "compliance"),
        (["--windows=[0]"], "windows"),
        (["--stage3.epochs=-1"], "stage3.epochs"),
        (["--prompt_encoder=/no/such"], "prompt_encoder"),
        (["--CATEGORY_FIELD=genre"], "genre"),
        (["--TIME_FIELD=when"], "when"),
        (["--resume=nowhere"], "nowhere"),
        (["--stage1_checkpoint=nowhere"], "nowhere"),
        (["--epochs"], "--key=value"),
        (["--epochs=1", "--epochs=2"], "twice"),
        (["--output_dir=/proc/none"], "--output_dir="),
        (["--item_texts=none"], "item_texts"),
    ],
)
def test_wrong_inputs(here, capsys, arguments, said):
    names = [a.partition("=")[0] for a in arguments]
    usual = [a for a in here[1] if a.partition("=")[0] not in names]
    assert said in fails(capsys, *usual, *arguments)


def test_broken_config_file(here, capsys):
    (here[0] / "broken.yaml").write_text("a: [1, 2\nb: }")
    assert "not YAML" in fails(capsys, *here[1][:2], "--config_files=broken.yaml")


def test_checkpoint_of_another_dataset(here, finished, capsys):
    tiny.write(here[0], "other", seed=3)
    said = fails(capsys, "--model=DPR_SASRec", "--dataset=other", here[1][2], f"--stage1_checkpoint={finished[1]['folder']}")
    assert "tiny" in said


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint(here, capsys, damage):
    folder, usual = here
    run_dpr("DPR_SASRec", "tiny", config_dict=settings(folder, item_texts=None, output_dir="out", stages=[1], epochs=1))
    path = folder / "out" / "checkpoints" / "stage1.last.pt"
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    assert "stage1.last.pt" in fails(capsys, "--model=DPR_SASRec", "--dataset=tiny", "--resume=out")


def test_damaged_model(finished, tmp_path):
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((finished[0] / "out" / name).read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    with pytest.raises(UserError, match="finished run"):
        load(tmp_path / "none")


def test_a_second_run_does_not_overwrite_the_first(here, finished, capsys):
    assert "--resume=" in fails(capsys, *here[1], f"--output_dir={finished[1]['folder']}")


def test_full_disk(here, capsys, monkeypatch):
    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in fails(capsys, *here[1], "--output_dir=out")
    assert not list((here[0] / "out" / "checkpoints").glob("*.pt"))


def test_ctrl_c_leaves_a_run_that_can_go_on(here, capsys, monkeypatch):
    real = StageTrainer._after_epoch

    def interrupt(self, epoch, score):
        real(self, epoch, score)
        raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_after_epoch", interrupt)
    assert main(["run", *here[1], "--output_dir=out"]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(here[0])
    assert main(["run", "--resume=out"]) == 0  # as the line says: no model, no dataset
    assert (here[0] / "out" / "table.md").exists()


def test_the_command_as_users_type_it(here):
    """run_dpr.py in a process of its own: exit code 0, a table at the end, progress with the loss on it."""
    done = subprocess.run(
        [sys.executable, ROOT / "run_dpr.py", *here[1], "--show_progress=True", "--output_dir=out"], capture_output=True, text=True, cwd=here[0]
    )
    assert done.returncode == 0, done.stderr
    assert "| DPR_SASRec" in done.stdout and "| Base" in done.stdout
    assert re.search(r"stage 1 epoch 1/1 +loss \d", done.stdout + done.stderr)


def test_help_and_unknown_command(capsys):
    assert main(["--help"]) == 0
    assert "recbole-dpr run" in capsys.readouterr().out
    assert main(["bake"]) == 2
    assert "doctor" in capsys.readouterr().err


def test_evaluation_set_is_a_function_of_dataset_protocol_and_seed(finished):
    def queries(**more):
        config = make_config("DPR_SASRec", "tiny", (), settings(finished[0], **more))
        return build_queries(read_sequences(config), config)

    first, same, other = queries(), queries(hidden_size=32, train_batch_size=77, item_text=False), queries(seed=7)
    for a, b in zip(first, same):
        np.testing.assert_array_equal(a.targets, b.targets)
        np.testing.assert_array_equal(a.draws, b.draws)
    assert any(not np.array_equal(a.targets, c.targets) for a, c in zip(first, other))
