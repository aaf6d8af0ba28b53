"""Baselines of a DPR run: fine-tuned from stage 1, CTRL-Rec's form, random prompts; and what every query scored."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from recbole_dpr import run_dpr
from recbole_dpr.data.loaders import PackedBatch, PromptedTargets
from recbole_dpr.evaluation import methods
from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable
from recbole_dpr.prompts.item_text import DescriptionText
from recbole_dpr.train import checkpoints
from recbole_dpr.train.trainer import StageTrainer

MODELS = ("DPR_SASRec", "DPR_BERT4Rec")  # trained on packed sequences, on sampled histories


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder)
    return folder


def run(data, folder, model="DPR_SASRec", **more):
    sizes = {"train_batch_size": 500, "prefix_batch_size": 200, "base_f": {"learning_rate": 0.01}}
    settings = tiny.settings(data, model, item_texts=None, epochs=2, output_dir=str(folder), **{**sizes, **more})
    return run_dpr(model, "tiny", config_dict=settings)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Model -> result of a run with the baselines."""
    folder = tmp_path_factory.mktemp("runs")
    return {model: run(data, folder / model, model, baselines=True) for model in MODELS}


def rows(result):
    return {(r["method"], r["task"], r["prompt"], r["window"]): r["metrics"] for r in result["results"]}


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuned_baselines_have_their_rows(finished, model):
    found = rows(finished[model])
    for suffix in ("+f", "+f+a"):
        assert (f"Base{suffix}", "SEQ", "none", None) in found
        for task in ("POS", "NEG"):
            for method in (f"Base{suffix}", f"Filter{suffix}"):
                assert {(method, task, "category", window) for window in (2, 3, "avg")} <= found.keys()
    assert {row["stage"] for row in finished[model]["history"]} == {1, 2, "Base+f", "Base+f+a"}
    assert found["Base", "SEQ", "none", None] != found["Base+f", "SEQ", "none", None]


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuning_trains_the_unprompted_backbone_alone(finished, model):
    weights = {
        name: checkpoints.load(f"{finished[model]['folder']}/checkpoints/{name}.best.pt")["state_dict"] for name in ("stage1", "Base+f", "Base+f+a")
    }
    own = [name for name in weights["stage1"] if not name.startswith("prompted_backbone.")]
    for tuned in ("Base+f", "Base+f+a"):
        changed = {name for name in own if not torch.equal(weights[tuned][name], weights["stage1"][name])}
        assert "item_embedding.weight" in changed
        assert not [name for name in changed if name.startswith(("projector.", "tower.", "item_weights.", "item_side"))]


def test_baselines_leave_the_other_rows_as_they_are(data, finished, tmp_path):
    plain = run(data, tmp_path / "plain")
    found = rows(finished["DPR_SASRec"])
    assert "baselines" not in plain["seconds"]
    assert rows(plain) == {key: value for key, value in found.items() if "+f" not in key[0]}


def test_resumed_in_the_baselines_is_bit_for_bit_uninterrupted(data, finished, tmp_path, monkeypatch):
    real = StageTrainer._after_epoch

    def die(self, epoch, score):
        real(self, epoch, score)
        if (self.name, epoch) == ("Base+f+a", 0):
            raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_after_epoch", die)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut", baselines=True)
    monkeypatch.undo()
    resumed = run_dpr("DPR_SASRec", "tiny", config_dict={"resume": str(tmp_path / "cut")})
    assert resumed["results"] == finished["DPR_SASRec"]["results"]
    assert resumed["history"] == finished["DPR_SASRec"]["history"]


def test_implicit_loss_is_that_of_the_targets_without_prompts():
    """Two prompted positions, one with two targets: the mean of their cross-entropies, whatever the prompts are."""
    from recbole_dpr.model.dpr import Promptable

    states, items = torch.randn(3, 4), torch.randn(6, 4)
    weights = {"pos": 2.0, "neg": 1.0}
    model = SimpleNamespace(
        loss_weights=weights, prompt_temperature=0.5, softmax_dtype=torch.float32, batch_states=lambda batch: states, item_matrix=lambda: items
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    parts = [
        PromptedTargets(0, torch.tensor([2, 0]), torch.tensor([[3, -1], [1, 5]]), *[torch.tensor([7, 7])] * 3),
        PromptedTargets(1, nothing, nothing.reshape(0, 2), nothing, nothing, nothing),
    ]
    log_p = (states @ items.T / 0.5).log_softmax(1)
    expected = -2.0 * (log_p[2, 3] + (log_p[0, 1] + log_p[0, 5]) / 2) / 2
    (loss,) = Promptable.implicit_loss(model, PackedBatch(None, None, None, parts))
    torch.testing.assert_close(loss, expected)


# --- text


def test_description_is_title_and_categories_and_tags_without_wishes():
    """Two tags and a wish: the cosine with the mean of the description and the tags; a tag that is quoted can be left out."""
    vectors = torch.nn.functional.normalize(torch.randn(8, 5), dim=1)
    phrase = np.array([[NO_PROMPT] * 3, [0, 1, 2], [3, NO_PROMPT, 4]])
    bank = SimpleNamespace(phrase=phrase, about=np.array([NO_PROMPT, 6, 7]), asked=PromptTable(vectors), tag=(np.zeros((3, 2, 2)),))
    text = DescriptionText(bank)
    expected = torch.nn.functional.normalize(torch.stack([vectors[6] + vectors[0] + vectors[1], vectors[7] + vectors[3]]), dim=1)
    torch.testing.assert_close(text.vectors[1:], expected)
    assert not text.vectors[0].any() and not text.offsets.any()
    left, _ = text.without(torch.tensor([1, 2]), vectors[[1, 3]])
    torch.testing.assert_close(left, torch.nn.functional.normalize(torch.stack([vectors[6] + vectors[0], vectors[7]]), dim=1))


def test_one_weight_is_tuned_for_several_query_sets():
    """w = 2 is best for neither set, and best for their mean."""
    values = {"a": {1: 0.6, 2: 0.5, 3: 0.0}, "b": {1: 0.0, 2: 0.5, 3: 0.6}}
    evaluator = SimpleNamespace(mean=lambda prompted, score: {"NDCG@10": values[prompted][score.__self__.weight]})
    assert methods.tuned_weight(evaluator, None, None, ["a"], (1, 2, 3)) == (1, 0.6)
    assert methods.tuned_weight(evaluator, None, None, ["a", "b"], (1, 2, 3)) == (2, 0.5)


@pytest.mark.parametrize("method", ["CTRL-Rec", "Base+text", "DPR_SASRec/rand"])
def test_prompted_baselines_have_every_prompted_query(finished, method):
    found = rows(finished["DPR_SASRec"])
    assert {key[1:] for key in found if key[0] == method} == {key[1:] for key in found if key[0] == "DPR_SASRec" and key[1] != "SEQ"}


# --- random prompts


@pytest.mark.parametrize("token_keys", [False, True])
def test_random_prompts_tell_the_model_nothing_of_the_prompt(token_keys):
    items = torch.zeros(7, 5)
    sizes = {"item_side": items[:, 5:], "text_size": 0, "backbone_items": lambda: items, "item_matrix": lambda: items}
    model = SimpleNamespace(prompt_vectors=PromptTable(torch.randn(9, 4)), token_keys=token_keys, tokens_of=None, **sizes)
    first, again, other = (methods.RandomPrompts(None, None, model, seed) for seed in (1, 1, 2))
    prompt = torch.tensor([3, 5, 3])
    vectors, tokens = first.prompts[prompt], first._tokens(prompt)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors, again.prompts[prompt])
    torch.testing.assert_close(vectors[0], vectors[2])
    assert not torch.allclose(vectors, other.prompts[prompt])
    assert (tokens is None) is not token_keys
    if token_keys:
        torch.testing.assert_close(tokens[0][:, 0], vectors)
        assert not tokens[1].any()


def test_random_prompts_are_another_answer(finished):
    found = rows(finished["DPR_SASRec"])
    assert found["DPR_SASRec/rand", "POS", "category", "avg"] != found["DPR_SASRec", "POS", "category", "avg"]


# --- per_query.npz


@pytest.mark.parametrize("model", ["DPR_SASRec", "Pop"])
def test_the_queries_own_values_average_to_the_rows(data, finished, tmp_path, model):
    result = finished.get(model) or run_dpr(model, "tiny", config_dict=tiny.settings(data, model, output_dir=str(tmp_path / "zoo")))
    kept = np.load(f"{result['folder']}/per_query.npz")
    measured = [row for row in result["results"] if row["window"] != "avg"]
    names = {f"{r['method']}|{r['task']}|{r['prompt']}|{r['window'] or '-'}": r for r in measured}
    assert names.keys() == {name for name in kept if not name.startswith("user|")}
    for name, row in names.items():
        values, users = kept[name], kept["user|" + name.partition("|")[2]]
        assert values.dtype == np.float32 and len(values) == len(users) == row["queries"]
        assert values.mean() == pytest.approx(row["metrics"]["NDCG@10"], abs=1e-6)
        assert len(np.unique(users)) == len(users)  # one query for each user
