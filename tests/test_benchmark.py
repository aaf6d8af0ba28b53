"""The benchmark: its parts, what a second call does, its table, its tests of significance, every wrong input in one line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from scipy.stats import ttest_rel

from recbole_dpr.benchmark import parts as parts_module
from recbole_dpr.benchmark import report, run_benchmark
from recbole_dpr.benchmark.compare import gather, paired_p, summary
from recbole_dpr.benchmark.parts import Part, merged, plan
from recbole_dpr.cli import main
from recbole_dpr.config import make_config
from recbole_dpr.errors import UserError
from recbole_dpr.resources import properties_dir
from recbole_dpr.train.trainer import StageTrainer
from recbole_dpr.yamlfile import read_yaml

ABLATIONS = read_yaml(properties_dir() / "ablations.yaml")
NAMES = ["Pop-seed1", "CKE-seed1", "DPR_SASRec-seed1", "DPR_SASRec-one-tower-seed1"]
NAMES += [name.replace("seed1", "seed2") for name in NAMES]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder)
    return folder


def benchmark(data, folder, seeds="1,2", **more):
    """Pop, CKE (which cannot work without a knowledge graph), DPR_SASRec and an ablation of it."""
    settings = tiny.settings(data, item_texts=None, train_batch_size=500, epochs=1, output_dir=str(folder), **more)
    return run_benchmark("Pop,CKE,DPR_SASRec", "tiny", "one-tower", seeds, (), settings, "the command")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return benchmark(data, tmp_path_factory.mktemp("benchmark") / "out")


def results(folder, part):
    return json.loads((folder / part / "metrics.json").read_text())


# --- a whole benchmark


def test_every_part_is_a_run_of_its_own(finished):
    ended = {path.parent.name for path in finished.glob("*/metrics.json")}
    assert ended == {name for name in NAMES if not name.startswith("CKE")}
    assert {path.name for path in finished.iterdir() if path.is_file()} == {"table.md", "table.csv", "figure.png"}
    for name in ended:
        assert results(finished, name)["seed"] == int(name[-1])


def test_ablations_take_stage_1_over(finished):
    full, ablation = (results(finished, f"DPR_SASRec{name}-seed1") for name in ("", "-one-tower"))
    assert {row["stage"] for row in full["history"]} == {1, 2, "Base+f", "Base+f+a"}
    assert {row["stage"] for row in ablation["history"]} == {2}
    base = [[row for row in run["results"] if row["method"] == "Base"] for run in (full, ablation)]
    assert base[0] == base[1]
    assert yaml.safe_load((finished / "DPR_SASRec-one-tower-seed1" / "config.yaml").read_text())["two_towers"] is False


def test_the_table(finished):
    text = (finished / "table.md").read_text()
    for said in ("`the command`", "60 users, 80 items", "recbole 1.2.0", "seeds 1, 2; 6 of 8 runs have ended", "learns without epochs"):
        assert said in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    for label in ("Pop", "Filter Pop", "Base (SASRec)", "Filter+f+a (SASRec)", "CTRL-Rec (SASRec)", "**DPR_SASRec**", "DPR_SASRec, one-tower"):
        assert rows.count(label) == 2  # NDCG@10 and Recall@10
    assert "| not run" in next(line for line in text.splitlines() if line.startswith("| CKE "))
    assert "not run: dataset 'tiny'" in text and "tiny.kg" in text


def test_the_csv_has_the_means_and_deviations_of_the_runs(finished):
    table = pd.read_csv(finished / "table.csv").set_index(["label", "task", "prompt", "window", "metric"])
    for label, method, part in (("DPR_SASRec", "DPR_SASRec", "DPR_SASRec"), ("Base (SASRec)", "Base", "DPR_SASRec"), ("Pop", "Pop", "Pop")):
        for row in results(finished, f"{part}-seed1")["results"]:
            if row["method"] != method:
                continue
            where = [row["task"], row["prompt"], row["window"]]
            again = next(r for r in results(finished, f"{part}-seed2")["results"] if [r[k] for k in ("method", "task", "prompt", "window")] == [method, *where])
            for name, value in row["metrics"].items():
                cell = table.loc[(label, *where[:2], str(where[2] or "-"), name)]
                both = [value, again["metrics"][name]]
                assert cell["mean"] == pytest.approx(np.mean(both), abs=1e-5) and cell["std"] == pytest.approx(np.std(both, ddof=1), abs=1e-5)
                assert cell["seeds"] == 2 and cell["queries"] == row["queries"] + again["queries"]


def test_a_second_call_takes_over_what_has_ended(data, finished, monkeypatch):
    called, real = [], parts_module.run_dpr
    monkeypatch.setattr(parts_module, "run_dpr", lambda model, *rest: [called.append(model), real(model, *rest)])
    before = (finished / "table.csv").read_bytes()
    benchmark(data, finished, show_progress=True)
    assert called == ["CKE", "CKE"]
    assert (finished / "table.csv").read_bytes() == before


def test_interrupted_and_given_again_is_as_uninterrupted(data, finished, tmp_path, monkeypatch):
    real = StageTrainer._after_epoch

    def interrupt(self, epoch, score):
        real(self, epoch, score)
        if self.name == "Base+f":
            raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_after_epoch", interrupt)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        benchmark(data, folder, "1")
    assert "1 of 4 runs have ended" in (folder / "table.md").read_text()
    assert set(pd.read_csv(folder / "table.csv").label) == {"Pop", "Filter Pop"}
    monkeypatch.undo()
    benchmark(data, folder, "1")
    for name in ("DPR_SASRec-seed1", "DPR_SASRec-one-tower-seed1"):
        assert results(folder, name)["results"] == results(finished, name)["results"]


def test_runs_of_other_settings_are_not_mixed(data, finished):
    with pytest.raises(UserError, match="is of fusion_heads=2, not 4; name another --output_dir="):
        benchmark(data, finished, fusion_heads=4)


# --- the plan


def test_models_get_the_settings_that_they_know():
    settings = merged({"stage2": {"epochs": 2, "prompt_noise": 0.5}, "epochs": 9}, {"stage2.epochs": 1})
    pop, dpr, frozen = plan(["Pop", "DPR_GRU4Rec"], "frozen-backbone", [7], settings)
    assert pop.settings == {"epochs": 9, "seed": 7}
    assert dpr.settings == {"epochs": 9, "seed": 7, "baselines": True, "stage2": {"epochs": 1, "prompt_noise": 0.5}}
    assert frozen.settings["stage2"] == {"epochs": 1, "prompt_noise": 0.5, "backbone_learning_rate": 0.0}
    assert not frozen.settings["baselines"] and frozen.stage1_of == dpr
    assert (frozen.name, frozen.label) == ("DPR_GRU4Rec-frozen-backbone-seed7", "DPR_GRU4Rec, frozen-backbone")


def test_some_models_get_settings_of_their_own():
    settings = {"epochs": 9, "stage2.epochs": 1, "per_model": {"Pop": {"epochs": 3}, "DPR_SASRec": {"stage2": {"prompt_noise": 0.5}}}}
    pop, gru, dpr, frozen = plan(["Pop", "DPR_GRU4Rec", "DPR_SASRec"], "frozen-backbone", [7], settings, ["DPR_SASRec"])
    assert pop.settings == {"epochs": 3, "seed": 7}
    assert gru.settings["epochs"] == dpr.settings["epochs"] == 9 and gru.settings["stage2"] == {"epochs": 1}
    assert dpr.settings["stage2"] == {"epochs": 1, "prompt_noise": 0.5}
    assert frozen.stage1_of == dpr and frozen.settings["stage2"] == {"epochs": 1, "prompt_noise": 0.5, "backbone_learning_rate": 0.0}


def test_parts_come_seed_by_seed_and_full_models_first():
    names = [part.name for part in plan("Pop, DPR_SASRec,Pop", "all", "3,1,3", {})]
    assert names[:3] == ["Pop-seed3", "DPR_SASRec-seed3", "DPR_SASRec-2-stage-seed3"]
    assert len(names) == 2 * (2 + len(ABLATIONS)) and names[len(names) // 2] == "Pop-seed1"


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_settings_that_exist(name):
    full, ablation = plan("DPR_SASRec", name, "1", {})
    configs = [make_config(part.model, "ml-100k", (), part.settings) for part in (full, ablation)]
    changed = set(merged(ABLATIONS[name])) - {"config_files"} or {"item_text", "decouple_backbone", "pos_target", "stage3"}
    assert all(configs[0][key] != configs[1][key] for key in changed)
    assert configs[1]["stage2"]["train_batch_size"] == 800  # of properties/dataset/ml-100k.yaml


# --- figures by hand


def test_paired_p_is_the_t_test_over_users():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 12))
    users = generator.permutation(40)[:12]
    assert paired_p([(users, a - b)]) == pytest.approx(ttest_rel(a, b).pvalue)
    # differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom
    assert paired_p([(np.array([0, 1, 2]), np.array([1.0, 2.0, 3.0]))]) == pytest.approx(0.07418, abs=1e-5)


def test_the_same_queries_twice_are_no_more_evidence():
    users, difference = np.arange(5), np.array([1.0, 2.0, 3.0, 0.0, -1.0])
    once = paired_p([(users, difference)])
    assert paired_p([(users, difference)] * 3) == pytest.approx(once)
    assert paired_p([(np.repeat(users, 2), np.repeat(difference, 2))]) == pytest.approx(once)
    # users 3 and 4 were asked in one window alone: they add half of what they would have added to both, and 5/3 for its size
    two = paired_p([(users, difference), (users[:3], difference[:3])])
    added = difference / 5 + np.where(users < 3, difference / 3, 0)
    assert two == pytest.approx(ttest_rel(added, np.zeros(5)).pvalue)


def test_nothing_to_test():
    assert np.isnan(paired_p([]))
    assert np.isnan(paired_p([(np.arange(3), np.zeros(3))]))


def fake(folder, part, methods, seed):
    """A finished part: method -> values of its three SEQ queries."""
    where = folder / part.name
    where.mkdir(parents=True)
    rows = [
        {**{"method": method, "task": "SEQ", "prompt": "none", "window": None, "queries": 3}, "metrics": {"NDCG@10": float(np.mean(values))}}
        for method, values in methods.items()
    ]
    result = {
        **{"results": rows, "history": [], "seconds": {"train": 30.0}, "machine": "a machine", "versions": {"python": "3"}},
        **{"dataset_stats": {"users": 3}, "training": {"epochs": 4, "cap": 4, "stopped_early": False}},
    }
    (where / "metrics.json").write_text(json.dumps(result))
    values = {f"{method}|SEQ|none|-": np.array(v, dtype=np.float32) for method, v in methods.items()}
    np.savez(where / "per_query.npz", **values, **{"user|SEQ|none|-": np.array([4, 0, 2], dtype=np.int32)})


def test_mean_deviation_best_baseline_and_mark(tmp_path):
    """Pop .2 and .4, BPR .5 in one seed, DPR .6 and .8: BPR is the best baseline, and is compared in its one seed alone."""
    figures = {("Pop", 1): [0.1, 0.2, 0.3], ("Pop", 2): [0.4] * 3, ("BPR", 2): [0.5, 0.4, 0.6], ("DPR_SASRec", 1): [0.6] * 3, ("DPR_SASRec", 2): [0.8, 0.7, 0.9]}
    done = [Part(model, seed) for model, seed in figures]
    for part in done:
        fake(tmp_path, part, {part.model: figures[part.model, part.seed]}, part.seed)
    table = summary(gather(tmp_path, done), tmp_path, "NDCG@10").set_index("label")
    assert table.loc["Pop", "mean"] == pytest.approx(0.3) and table.loc["Pop", "std"] == pytest.approx(np.sqrt(0.02))
    assert set(table.best_baseline) == {"BPR"} and np.isnan(table.loc["BPR", "std"]) and table.loc["BPR", "seeds"] == 1
    assert table.loc["DPR_SASRec", "p"] < 1e-5 and table.p.notna().sum() == 1  # .3 above in each of its queries, but for rounding
    failed = Part("DPR_SASRec", 1, "mpnet")
    report.write(tmp_path, "hand-made", [*done, Part("BPR", 1), failed], {failed: "no encoder | none"}, "NDCG@10", None)
    text = (tmp_path / "table.md").read_text()
    assert "0.7000 ± 0.1414 *" in text and "| Pop " in text and "0.3000 ± 0.1414" in text
    assert "BPR (1 of 2 seeds)" in text and "not yet run" in text and r"not run: no encoder \| none" in text
    assert "4 of at most 4: the cap, early stopping had not fired" in text and "5 of 7 runs have ended, in 2.5 minutes" in text


def test_other_queries_are_not_compared(tmp_path):
    done = [Part("Pop", 1), Part("DPR_SASRec", 1)]
    for part in done:
        fake(tmp_path, part, {part.model: [0.1, 0.2, 0.3]}, 1)
    kept = dict(np.load(tmp_path / "Pop-seed1" / "per_query.npz"))
    np.savez(tmp_path / "Pop-seed1" / "per_query.npz", **{**kept, "user|SEQ|none|-": np.array([0, 1, 2])})
    with pytest.raises(UserError, match="other queries"):
        summary(gather(tmp_path, done), tmp_path, "NDCG@10")


# --- wrong inputs, through the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models=Pop,SASRek"], "SASRec"),
        (["--models="], "--models="),
        (["--models=DPR"], "DPR_NARM"),
        (["--models=DPR_SASRec", "--ablations=two-tower"], "one-tower"),
        (["--models=Pop,SASRec", "--ablations"], "DPR"),
        (["--models=Pop", "--seeds=1,x"], "--seeds=1,2,3"),
        (["--models=Pop", "--seeds=-1"], "seeds=-1"),
        (["--models=Pop", "--seeds=[1,0.5]"], "seeds=1,0.5"),
        (["--models=Pop", "--seed=1"], "--seeds="),
        (["--models=Pop,DPR_SASRec", "--stage2.epochz=1"], "epochz"),
        (["--models=Pop,DPR_SASRec", "--neg_targt=all"], "neg_target"),
        (["--models=Pop,DPR_SASRec", "--neg_target=all"], "compliance"),
        (["--models=Pop", "--windows=[0]"], "windows"),
        (["--models=Pop", "--valid_metric=MRR@10"], "NDCG@10"),
        (["--models=Pop", "--dataset=no-such"], "--data_path="),
        (["--models=Pop", "--config_files=none.yaml"], "none.yaml"),
        (["--models=CKE"], "tiny.kg"),
        (["--models=Pop,DPR_SASRec", "--ablations", "--ablated=DPR_SASRek"], "DPR_SASRec"),
        (["--models=Pop", "--per_model={SASRec: {epochs: 1}}"], "Pop"),
        (["--models=Pop", "--per_model={Pop: {epochz: 1}}"], "epochs"),
        (["--models=Pop", "--per_model={Pop: {seed: 1}}"], "--seeds="),
        (["--models=Pop", "--per_model=Pop"], "{SASRec: {epochs: 20}}"),
    ],
)
def test_wrong_inputs(data, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    model = "DPR_SASRec" if "DPR_SASRec" in arguments[0] else "Pop"
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny.settings(data, model, item_texts=None, epochs=1, output_dir=str(tmp_path / "out"))))
    usual = [a for a in ("--dataset=tiny", "--config_files=tiny.yaml") if a.partition("=")[0] not in " ".join(arguments)]
    assert main(["benchmark", *usual, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "out" / "table.md").exists()
