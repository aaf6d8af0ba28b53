"""Two processes on one run: the loss of one process with the doubled batch, the same metrics, one set of files."""

import json
import socket
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_dpr import distributed, load, run_dpr
from recbole_dpr.cli import main
from recbole_dpr.data.loaders import PackedBatch, PrefixBatch, PromptedTargets
from recbole_dpr.errors import UserError

PORT = 29731


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_texts(tmp_path_factory.mktemp("data"))
    tiny.write(folder)
    return folder


# --- parts of a batch


def batch_of(lengths, rng, kind):
    """A batch with sequences of these lengths; every number in it differs."""
    n, width = len(lengths), max(lengths)
    if kind is PrefixBatch:
        rows = np.arange(n)
    else:
        rows = np.flatnonzero(np.arange(width) < np.array(lengths)[:, None])
    numbers = iter(range(1, 10_000))
    fresh = lambda *shape: torch.tensor([next(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape)  # noqa: E731
    parts = []
    for intent in (0, 1):
        chosen = np.sort(rng.permutation(rows)[: rng.integers(len(rows) + 1)])
        parts.append(PromptedTargets(intent, torch.from_numpy(chosen), fresh(len(chosen), 3), *(fresh(len(chosen)) for _ in range(3))))
    more = {"lengths": torch.tensor(lengths)} if kind is PrefixBatch else {}
    return kind(fresh(n, width), torch.from_numpy(rows), fresh(len(rows)), parts, **more)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from([PackedBatch, PrefixBatch]), st.integers(0, 99))
def test_parts_hold_each_row_once_with_its_own_history(lengths, n_parts, kind, seed):
    whole = batch_of(lengths, np.random.default_rng(seed), kind)
    parts = [whole.part(number, n_parts) for number in range(n_parts)]

    def rows(batch, of):
        """(the sequence, the place in it, everything else) of every row."""
        others = [f.name for f in fields(of) if isinstance(getattr(of, f.name), torch.Tensor) and f.name not in ("rows", "item_seq", "lengths")]
        return [
            (tuple(batch.item_seq[row // batch.width].tolist()), row % batch.width, *(getattr(of, name)[i].tolist() for name in others))
            for i, row in enumerate(of.rows.tolist())
        ]

    key = lambda row: str(row)  # noqa: E731
    assert sorted((r for part in parts for r in rows(part, part)), key=key) == sorted(rows(whole, whole), key=key)
    assert sum(part.weight for part in parts) == pytest.approx(1)
    for n, of in enumerate(whole.prompted):
        assert sorted((r for part in parts for r in rows(part, part.prompted[n])), key=key) == sorted(rows(whole, of), key=key)
        assert sum(part.prompted[n].weight for part in parts) == pytest.approx(1 if len(of.rows) else 0)
    if kind is PrefixBatch:
        assert torch.equal(torch.cat([part.lengths for part in parts]).sort().values, whole.lengths.sort().values)


# --- whole runs


# nothing random beside what the loader draws
STILL = {
    "SASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    "NARM": {"dropout_probs": [0.0, 0.0]},
}
SAME = ("method", "task", "prompt", "window", "queries")


@pytest.mark.parametrize(("name", "more"), [("SASRec", {"baselines": True}), ("NARM", {"stages": [1, 2]})])
def test_two_processes_are_one_with_the_doubled_batch(folder, tmp_path, name, more):
    """All stages and baselines, whole sequences and sampled histories; only sums in another order differ."""
    exact = {"softmax_precision": "float32", "backbone_precision": "float32"}  # in bfloat16 the order of sums is seen
    settings = tiny.settings(folder, f"DPR_{name}", item_texts=str(folder), epochs=1, fusion_dropout=0.0, **STILL[name], **exact, **more)

    def run(where, batch, **launch):
        sizes = {"train_batch_size": 10 * batch, "prefix_batch_size": batch}
        stages = {stage: {"train_batch_size": 10 * batch} for stage in ("stage2", "stage3", "base_f_a")}
        stages["stage3"]["prompt_noise"] = 0.0
        return run_dpr(f"DPR_{name}", "tiny", (), {**settings, **sizes, **stages, "output_dir": str(tmp_path / where), **launch})

    one, two = run("one", 40), run("two", 20, nproc=2, port=PORT)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert (a["stage"], a["epoch"]) == (b["stage"], b["epoch"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["score"] == pytest.approx(a["score"], abs=1e-3)
    for a, b in zip(one["results"], two["results"], strict=True):
        assert [a[key] for key in SAME] == [b[key] for key in SAME]
        assert b["metrics"] == pytest.approx(a["metrics"], abs=2e-3)
    assert two["machine"].startswith("2 processes")
    written = [{path.name for path in (tmp_path / where).iterdir()} for where in ("one", "two")]
    assert written[0] == written[1]
    rec = [load(tmp_path / where) for where in ("one", "two")]
    np.testing.assert_allclose(rec[0].item_embeddings, rec[1].item_embeddings, atol=1e-4)


def test_processes_go_on_where_one_stopped(folder, tmp_path):
    """The files of a run are the same, however many processes write it."""
    settings = tiny.settings(folder, "DPR_SASRec", item_texts=None, stages=[1, 2], output_dir=str(tmp_path / "run"))
    first = run_dpr("DPR_SASRec", "tiny", (), {**settings, "stages": [1], "epochs": 1})
    (tmp_path / "run" / "metrics.json").unlink()
    more = {"resume": first["folder"], "stages": [1, 2], "epochs": 1, "nproc": 2, "port": PORT + 1}
    second = run_dpr("DPR_SASRec", "tiny", (), more)
    assert [row["stage"] for row in second["history"]] == [1, 2]
    assert second["history"][0] == first["history"][0]


# --- wrong inputs


@pytest.fixture
def taken_port():
    with socket.create_server(("localhost", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc=0"], "nproc=0"),
        (["--nproc=two"], "nproc=two"),
        (["--nproc=2", "--port=http"], "port=http"),
        (["--nproc=2", "--world_size=3", "--group_offset=2"], "world_size=3"),
        (["--nproc=2", "--model=Pop"], "Pop"),
        (["--nproc=2", "--prompt_encoder=/no/such/folder"], "/no/such/folder"),
        (["--nproc=2", "--port=TAKEN"], "--port="),
    ],
)
def test_wrong_inputs(folder, tmp_path, monkeypatch, capfd, request, arguments, said):
    """One line, also where it is a process of the group that finds out."""
    monkeypatch.chdir(tmp_path)
    taken = request.getfixturevalue("taken_port") if "--port=TAKEN" in arguments else None
    arguments = [a.replace("TAKEN", str(taken)) for a in arguments]
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny.settings(folder, checkpoint_dir=str(tmp_path / "saved"), show_progress=False)))
    usual = [a for a in ("--model=DPR_SASRec", "--port=29735") if a.partition("=")[0] not in " ".join(arguments)]
    assert main(["run", "--dataset=tiny", "--config_files=tiny.yaml", *usual, *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("recbole-dpr:") <= 1, error


def test_without_a_group_nothing_is_shared():
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    value = torch.ones(3)
    assert distributed.summed(value) is value and distributed.from_first("x") == "x"
    with pytest.raises(UserError, match="nproc=-1"):
        distributed.launch_settings({"nproc": -1})
    assert distributed.launch_settings({"nproc": 1, "port": 1}) is None
