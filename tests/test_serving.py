"""A loaded model's answers: strength, known users, filters, explanations, threads, and every wrong request in one line."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_dpr import load, parse_prompt
from recbole_dpr.errors import UserError
from recbole_dpr.model.paired import PairedSASRec
from recbole_dpr.prompts.intent import Clause, router
from recbole_dpr.serving import recommender
from recbole_dpr.serving.memory import Memory
from recbole_dpr.serving.user_tower import UserTower

HISTORY = ["i3", "i14", "i15"]
TWO = "a western, but no horror"


@pytest.fixture(scope="module")
def rec(tiny_model):
    return load(tiny_model)


def everything(rec, prompt, **more):
    return rec.recommend(HISTORY, prompt, k=len(rec.items), **more)


# --- strength


def test_strength_0_is_the_plain_backbone_exactly(rec):
    plain, silent = everything(rec, None), everything(rec, TWO, strength=0)
    assert silent.items == plain.items and silent.scores == plain.scores
    np.testing.assert_array_equal(rec.user_embedding(HISTORY, TWO, 0), rec.user_embedding(HISTORY))


def test_strength_1_is_as_trained(rec):
    assert everything(rec, TWO, strength=1).scores == everything(rec, TWO).scores


def test_strength_is_a_straight_line_to_1_and_then_grows_by_the_prompts_move(rec):
    u = {s: rec.user_embedding(HISTORY, TWO, s) for s in (0, 0.25, 1, 2, 3)}
    np.testing.assert_allclose(u[0.25], 0.75 * u[0] + 0.25 * u[1], atol=1e-4)
    np.testing.assert_allclose(u[3] - u[2], u[2] - u[1], atol=1e-4)
    size = rec.model.state_size
    np.testing.assert_allclose(u[3][:size], u[1][:size], atol=1e-5)  # the unprompted score keeps its weight
    assert not np.allclose(u[3], u[1], atol=1e-2)


def test_strength_is_continuous(rec):
    for s in (0.0, 1.0):
        near, at = rec.user_embedding(HISTORY, TWO, s + 1e-5), rec.user_embedding(HISTORY, TWO, s)
        np.testing.assert_allclose(near, at, atol=1e-3)


def test_strength_of_each_clause(rec):
    assert everything(rec, TWO, strength=[1, 0]).items == everything(rec, parse_prompt(TWO)[:1]).items
    assert everything(rec, TWO, strength=[1, 0]).items != everything(rec, TWO).items
    assert everything(rec, TWO, strength=[0, 0]).scores == everything(rec, None).scores


def test_strength_of_each_request_of_a_batch(rec):
    answers = rec.recommend_batch([HISTORY] * 3, [TWO] * 3, k=9, strength=[0, 2, [0.5, 1]])
    for answer, strength in zip(answers, (0, 2, [0.5, 1])):
        assert answer.items == rec.recommend(HISTORY, TWO, k=9, strength=strength).items


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "2", True, [1], [1, 2, 3], [1, "x"], None])
def test_bad_strength(rec, strength):
    with pytest.raises(UserError, match="strength="):
        rec.recommend(HISTORY, TWO, strength=strength)


# --- prompts


def test_clauses_may_be_given_and_flipped(rec):
    assert everything(rec, parse_prompt(TWO)).scores == everything(rec, TWO).scores
    flipped = everything(rec, [Clause("a western", "negative")])
    assert flipped.intents == ["negative"]
    assert flipped.items != everything(rec, [Clause("a western", "positive")]).items


@pytest.mark.parametrize("prompt", [5, ["a western"], {"text": "x"}])
def test_a_prompt_is_text_or_clauses(rec, prompt):
    with pytest.raises(UserError, match="Clause"):
        rec.recommend(HISTORY, prompt)


@pytest.mark.parametrize("prompt", ["", " \n", "🎬🤠", "no 🎃!", "أريد فيلم كوميدي بلا رعب", "<script>alert(1)</script>", "\ud800 half", "\0", "a" * 999])
def test_odd_prompts_are_answered(rec, prompt):
    found = rec.recommend(HISTORY, prompt, k=5)
    assert len(found.items) == 5 and np.isfinite(found.scores).all()


@pytest.mark.parametrize("prompt", ["no, " * 2500, "a western " * 1000, "x" * 10_000])
def test_a_prompt_of_10_000_characters_is_cut_with_a_warning(rec, prompt):
    with pytest.warns(UserWarning, match="10,000 characters"):
        found = rec.recommend(HISTORY, prompt, k=5)
    assert found.items == rec.recommend(HISTORY, prompt[: recommender.MAX_PROMPT], k=5).items


# --- users


def test_a_known_user_is_the_users_whole_history(rec, tiny_model):
    lines = (tiny_model.parent / "tiny" / "tiny.inter").read_text().splitlines()[1:]
    watched = [line.split("\t")[1] for line in lines if line.startswith("u7\t")]
    assert rec.history("u7") == watched
    assert len(rec.users) == 60
    assert rec.recommend(user="u7", prompt=TWO).items == rec.recommend(watched, TWO).items


@pytest.mark.parametrize("user", ["nobody", 7, "<b>u7</b>", "u" * 10_000])
def test_unknown_user(rec, user):
    with pytest.raises(UserError, match="60 users, such as u") as error:
        rec.recommend(user=user)
    assert len(str(error.value)) < 250


def test_a_user_or_a_history(rec):
    with pytest.raises(UserError, match="one of them"):
        rec.recommend(HISTORY, user="u7")


def test_a_folder_without_users(rec, tiny_model, tmp_path):
    """As runs before there was such a file left it, or as it is handed on without what people did."""
    old = shutil.copytree(tiny_model, tmp_path / "old", ignore=shutil.ignore_patterns("users.*", "checkpoints"))
    found = load(old)
    assert found.users == []
    assert found.recommend(HISTORY, TWO).items == rec.recommend(HISTORY, TWO).items
    with pytest.raises(UserError, match="users.safetensors"):
        found.recommend(user="u7")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_users(tiny_model, tmp_path, damage):
    folder = shutil.copytree(tiny_model, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoints"))
    path = folder / "users.safetensors"
    path.write_bytes(path.read_bytes()[:100] if damage == "cut" else (folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="users.safetensors is damaged"):
        load(folder)


def test_new_users(rec):
    """Without a history the average user stands in; the prompt steers all the same."""
    assert rec.recommend().items == rec.recommend([]).items
    assert rec.recommend(prompt=TWO).items != rec.recommend().items


# --- routers


def test_the_router_of_the_run_is_used_unless_another_is_named(tiny_model, tmp_path):
    """Of `I can't get enough of westerns` the cues see a negation, the tagger what is meant."""
    text, folder = "I can't get enough of westerns", shutil.copytree(tiny_model, tmp_path / "cues", ignore=shutil.ignore_patterns("checkpoints"))
    description = json.loads((folder / "model.json").read_text())
    assert description["config"]["intent_router"] == "tagger"
    description["config"]["intent_router"] = "cues"
    (folder / "model.json").write_text(json.dumps(description))
    for loaded, name in ((load(tiny_model), "tagger"), (load(tiny_model, intent_router="cues"), "cues"), (load(folder), "cues")):
        assert loaded.clauses(text) == router(name)(text)
    assert router("tagger")(text) != router("cues")(text)


def test_a_folder_of_an_older_version_takes_the_tagger(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints"))
    description = json.loads((folder / "model.json").read_text())
    del description["config"]["intent_router"], description["config"]["intent_model"]
    (folder / "model.json").write_text(json.dumps(description))
    assert load(folder).clauses(TWO) == parse_prompt(TWO)


def test_clauses_are_the_content_where_the_router_splits_and_sentences_elsewhere(rec, tiny_model, monkeypatch):
    """The tagger's "a western" is embedded as it is; of the whole prompts of other routers only what they describe."""
    monkeypatch.setattr("recbole_dpr.prompts.description.read", lambda tagger, encoder, texts, **more: [text.split()[-1] for text in texts])
    text, part = rec.encoder.encode(["tell me a western", "western"], cached=False)
    for loaded, found in ((rec, text), (load(tiny_model, intent_router="cues"), part)):
        monkeypatch.setattr(loaded._prompts, "tagger", "stands in, for a model without one")
        for sentences, wanted in ((None, found), (True, part), (False, text)):
            assert np.abs(loaded.prompt_vectors(["tell me a western"], sentences)[0] - wanted).max() < 1e-6


def test_an_unknown_router(tiny_model):
    with pytest.raises(UserError, match="intent_router=.*nli"):
        load(tiny_model, intent_router="nly")


def test_a_prompt_is_read_once(tiny_model, monkeypatch):
    rec = load(tiny_model)
    first = rec.recommend(HISTORY, "a prompt to read once, no horror")
    monkeypatch.setattr("recbole_dpr.prompts.clause_tagger.Reader.__call__", lambda *_: pytest.fail("read again"))
    assert rec.recommend(HISTORY, "a prompt to read once, no horror") == first


# --- filters


def test_filters(rec):
    order = everything(rec, TWO).items
    assert everything(rec, TWO, allow=order[5:8]).items == order[5:8]
    assert everything(rec, TWO, deny=order[:3]).items == order[3:]
    western = [item for item in order if "western" in rec.categories[rec.items.index(item)]]
    assert western and everything(rec, TWO, categories=["western"]).items == western
    assert everything(rec, TWO, categories="western", deny=western[:1]).items == western[1:]
    assert everything(rec, TWO, allow=[]).items == []
    assert set(everything(rec, TWO, exclude_seen=False).items) == set(order) | set(HISTORY)


def test_filters_hold_for_every_request_of_a_batch(rec):
    for found in rec.recommend_batch([HISTORY, []], [TWO, None], k=4, deny=["i1", "i2"], categories=["drama"]):
        assert not {"i1", "i2"} & set(found.items)
        assert all("drama" in names for names in found.categories)


def test_unknown_ids_in_filters(rec):
    with pytest.warns(UserWarning, match="deny list are unknown.*i999"):
        assert rec.recommend(HISTORY, deny=["i999"]).items == rec.recommend(HISTORY).items
    with pytest.raises(UserError, match="Valid: .*western"):
        rec.recommend(HISTORY, categories=["wester"])
    with pytest.raises(UserError, match="allow list='i1'"):
        rec.recommend(HISTORY, allow="i1")


# --- explanations


def test_explanations_are_the_ranks_without_the_prompt(rec):
    found, plain = rec.recommend(HISTORY, TWO, k=10, explain=True), everything(rec, None).items
    assert found.plain_ranks == [plain.index(item) + 1 for item in found.items]
    assert found.moves == [plain.index(item) - now for now, item in enumerate(found.items)]
    assert any(found.moves)
    assert [clause.text for clause in found.clauses] == ["a western", "horror"]
    assert rec.recommend(HISTORY, explain=True).moves == [0] * 10
    assert rec.recommend(HISTORY, TWO).plain_ranks == []


def test_explanations_respect_the_filters(rec):
    found = everything(rec, TWO, categories=["western"], explain=True)
    assert sorted(found.plain_ranks) == list(range(1, len(found.items) + 1))


# --- batches, threads, titles


def test_a_large_batch_is_answered_in_parts(rec, monkeypatch):
    histories, prompts = [[f"i{n % 80}"] for n in range(50)], [TWO, None, "a drama", "", "no comedy"] * 10
    whole = rec.recommend_batch(histories, prompts, k=5, explain=True)
    monkeypatch.setattr(recommender, "_AT_ONCE", 7)
    for part, found in zip(rec.recommend_batch(histories, prompts, k=5, explain=True), whole, strict=True):
        assert (part.items, part.plain_ranks, part.clauses) == (found.items, found.plain_ranks, found.clauses)
        np.testing.assert_allclose(part.scores, found.scores, rtol=1e-3)
    assert rec.recommend_batch([], []) == []
    assert rec.user_embeddings([], []).shape == (0, rec.item_embeddings.shape[1])
    assert rec.user_embeddings(histories, prompts).shape == (50, rec.item_embeddings.shape[1])


def test_50_requests_at_once(tiny_model):
    """New prompts in every thread, which take turns at the sentence encoder: its tokenizer may refuse two callers at once."""
    rec, busy = load(tiny_model), Lock()
    encode = rec.encoder.encode

    def alone(*args, **more):
        assert busy.acquire(blocking=False)
        try:
            return encode(*args, **more)
        finally:
            busy.release()

    rec.encoder.encode = alone
    requests = [([f"i{n}"], f"a western like number {n}, but no horror of kind {n}", n / 10) for n in range(50)]

    def ask(request):
        history, prompt, strength = request
        return rec.recommend(history, prompt, k=5, strength=strength, explain=True)

    with ThreadPoolExecutor(50) as threads:
        together = list(threads.map(ask, requests))
    fresh = load(tiny_model)
    for request, found in zip(requests, together):
        history, prompt, strength = request
        assert found == fresh.recommend(history, prompt, k=5, strength=strength, explain=True)


def test_prompt_vectors_are_kept_in_memory(rec, monkeypatch):
    first = rec.recommend(HISTORY, "a prompt to keep")
    monkeypatch.setattr(rec.encoder, "encode", lambda *args, **more: pytest.fail("encoded again"))
    assert rec.recommend(HISTORY, "a prompt to keep") == first


def test_a_memory_keeps_what_was_used_last():
    memory = Memory(3)
    for n in range(3):
        memory.keep({n: str(n)})
    memory.keep(memory.found([0]))
    memory.keep({3: "3"})
    assert memory.found(range(9)) == {0: "0", 2: "2", 3: "3"}


def test_the_memory_of_prompts_is_bounded(tiny_model, monkeypatch):
    monkeypatch.setattr("recbole_dpr.serving.prompt_vectors._KEPT", 3)
    rec = load(tiny_model)
    monkeypatch.setattr("recbole_dpr.serving.clause_parts._KEPT_BYTES", 2 * 4 * len(rec.items))
    rec, clauses = load(tiny_model), [Clause(f"number {n}", "positive") for n in range(9)]
    for clause in clauses:
        rec.recommend(HISTORY, [clause])
    assert list(rec._prompts._known.found([(clause.text, False) for clause in clauses])) == [(f"number {n}", False) for n in (6, 7, 8)]
    assert list(rec._clauses._known.found(clauses)) == clauses[7:]


@pytest.mark.parametrize("prompt", [TWO, "a western", "no horror"])
def test_scores_are_the_dot_products_of_vectors(rec, prompt):
    """Lists add what is kept of a clause to the products of a part of the vectors; any vector store takes the whole."""
    for strength in (0.5, 1, [2] * len(parse_prompt(prompt))):
        found = everything(rec, prompt, strength=strength, exclude_seen=False)
        scores = rec.item_embeddings @ rec.user_embedding(HISTORY, prompt, strength)
        np.testing.assert_allclose(found.scores, np.sort(scores)[::-1], atol=1e-5)


def test_both_backbones_in_one_pass_are_each_by_itself(rec, monkeypatch):
    """Few items in all histories go through one pass, many through two; new users are among them."""
    histories, prompts = [HISTORY, [], [f"i{n}" for n in range(30)]], [TWO, "a western", None]
    together = rec.user_embeddings(histories, prompts)
    monkeypatch.setattr(PairedSASRec, "__call__", lambda *_: pytest.fail("one pass"))
    with pytest.raises(pytest.fail.Exception, match="one pass"):
        rec.user_embeddings(histories, prompts)
    monkeypatch.setattr("recbole_dpr.serving.user_tower._PAIRED", 0)
    np.testing.assert_allclose(rec.user_embeddings(histories, prompts), together, atol=1e-5)


def test_at_weight_0_prompted_requests_ask_one_backbone(tiny_model, monkeypatch):
    """The unprompted one counts with a request without a prompt, or with one of a strength below 1, alone."""
    rec = load(tiny_model, unprompted_weight=0)
    histories, prompts = [HISTORY, []], [TWO, "a western"]
    with monkeypatch.context() as patch:
        patch.setattr(UserTower, "asks_plain", lambda *_: True)
        lists, vectors = rec.recommend_batch(histories, prompts, strength=[[2, 0.5], 1]), rec.user_embeddings(histories, prompts)
    monkeypatch.setattr(PairedSASRec, "__call__", lambda *_: pytest.fail("both"))
    monkeypatch.setattr(rec.model, "encode", lambda *_: pytest.fail("unprompted"))
    found = rec.recommend_batch(histories, prompts, strength=[[2, 0.5], 1])
    assert [own.items for own in found] == [own.items for own in lists]
    np.testing.assert_allclose([own.scores for own in found], [own.scores for own in lists], atol=1e-5)
    np.testing.assert_allclose(rec.user_embeddings(histories, prompts), vectors, atol=1e-5)
    for others in ({"strength": 0.5}, {"prompts": [TWO, None]}):
        with pytest.raises(pytest.fail.Exception, match="both"):
            rec.recommend_batch(**{"histories": histories, "prompts": prompts, **others})
    for wrong in (-1, "0", True, float("nan")):
        with pytest.raises(UserError, match="unprompted_weight=.*: a number from 0"):
            load(tiny_model, unprompted_weight=wrong)


def test_a_weight_is_refused_where_there_is_one_backbone(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "run")
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    description["config"]["decouple_backbone"] = False
    (folder / "model.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(UserError, match="unprompted_weight=0: the model in .* has one backbone"):
        load(folder, unprompted_weight=0)


def test_one_backbone_for_all_is_asked_at_weight_0_too():
    model = SimpleNamespace(unprompted_weight=0.0)
    model.answering = model
    assert UserTower.asks_plain(SimpleNamespace(model=model), torch.ones(1), torch.zeros(1, dtype=torch.int64), 1)


def test_ids_may_come_in_any_collection(rec):
    """As numpy, a generator or a tuple brings them."""
    found = rec.recommend(HISTORY, TWO, deny=["i1"])
    for kind in (np.array, tuple, iter):
        assert rec.recommend(kind(HISTORY), TWO, deny=kind(["i1"])) == found


def test_title(rec):
    rec.titles[rec.items.index("i8")] = ""
    assert (rec.title("i7"), rec.title("i8")) == ("Film number 7", "i8")


def test_users_file_holds_numbers_and_names_alone(tiny_model):
    header = (tiny_model / "users.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + size])) == {"__metadata__", "items", "offsets"}


def test_nothing_warns_on_a_plain_request(rec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rec.recommend(HISTORY, TWO, explain=True)
