"""The evaluation's short cuts give what the plain way gives: rankings made once, states of several positions in one pass."""

import numpy as np
import pytest
import torch
from recbole.model.sequential_recommender import SASRec

from recbole_dpr.data.dataset import NO_ITEM
from recbole_dpr.evaluation import methods
from recbole_dpr.evaluation.evaluator import Evaluator, PromptedQueries
from recbole_dpr.evaluation.queries import QuerySet
from recbole_dpr.model.backbones import CausalGRU4Rec, CausalSASRec, ItemVocabulary
from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable

V, C, P, D = 40, 3, 5, 8
L = 12  # some histories are longer
NAMES = {"USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "n", "NEG_PREFIX": "neg_", "device": torch.device("cpu"), "backbone_precision": "float32"}


class _Sequences:
    """Four users of 5 … 30 random items each."""

    def __init__(self, rng):
        lengths = np.array([5, 11, 20, 30])
        self.offsets = np.append(0, np.cumsum(lengths))
        self.items, self.user_of, self.n_items = rng.integers(1, V, lengths.sum()), np.repeat(np.arange(4), lengths), V

    def history_lengths(self, positions, max_length):
        return np.minimum(positions - self.offsets[self.user_of[positions]], max_length)

    def histories(self, positions, max_length):
        lengths = self.history_lengths(positions, max_length)
        start = positions - lengths
        item_seq = np.zeros((len(positions), max(1, lengths.max(initial=1))), dtype=np.int64)
        for row, (a, n) in enumerate(zip(start, lengths)):
            item_seq[row, :n] = self.items[a : a + n]
        return item_seq, lengths

    def seen(self, positions):
        parts = [self.items[self.offsets[self.user_of[p]] : p] for p in positions]
        return np.repeat(np.arange(len(parts)), [len(part) for part in parts]), np.concatenate(parts)

    @property
    def positions(self):
        return np.setdiff1d(np.arange(len(self.items)), self.offsets)


class _ByPromptAndState:
    """A method that scores by position and prompt, and notes how many rankings it was asked for."""

    def __init__(self, rng, n_positions):
        self.of_position, self.of_prompt = (torch.from_numpy(rng.random((n, V))).float() for n in (n_positions, P))
        self.asked, self.prompts = 0, PromptTable(torch.zeros(P, 1))

    def score(self, prompted, rows):
        self.asked += len(rows)
        scores = self.of_position[prompted.queries.position[rows]]
        return scores.clone() if prompted.kind == "none" else scores + (1 - 2 * prompted.queries.intent) * self.of_prompt[prompted.prompt[rows]]

    depends_on = methods.Prompted.depends_on


def _sets(rng, positions):
    """SEQ, and POS and NEG of two windows and two kinds, over the same positions."""
    result = []
    for task, window, kind in [("SEQ", None, "none"), *((t, n, k) for t in ("POS", "NEG") for n in (3, 5) for k in ("category", "tag"))]:
        n = len(positions)
        targets = np.where(rng.random((n, 4)) < 0.6, rng.integers(1, V, (n, 4)), NO_ITEM)
        targets[:, 0] = rng.integers(1, V, n)
        queries = QuerySet(task, window, positions, targets, rng.integers(0, C, n), targets[:, 0], rng.random((n, 2)))
        prompt = np.zeros(n, dtype=np.int64) if kind == "none" else rng.integers(0, P, n)
        result.append(PromptedQueries(queries, kind, prompt, np.full(n, NO_PROMPT)))
    return result


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    sequences = _Sequences(rng)
    config = {"topk": [3, 10], "mask_history": True, "eval_batch_size": 7, "MAX_ITEM_LIST_LENGTH": L, "valid_metric": "NDCG@10"}
    return rng, sequences, Evaluator(sequences, config)


@pytest.mark.parametrize("kind", ["prompted", "filter", "base"])
def test_shared_rankings_are_the_queries_own(case, kind):
    rng, sequences, evaluator = case
    method = counted = _ByPromptAndState(rng, len(sequences.items))
    if kind != "prompted":
        states = lambda prompted, rows: counted.score(prompted, rows)[:, :D]  # noqa: E731
        counted.of_prompt *= 0
        method = methods.Base(states, torch.from_numpy(rng.random((V, D))).float())
    if kind == "filter":
        method = methods.Filter(method, torch.from_numpy(rng.random((V, C)) < 0.5))
    sets = _sets(rng, sequences.positions)
    found = evaluator.metrics(method, sets)
    n_queries, n_rankings = sum(map(len, sets)), counted.asked
    for prompted, metrics in zip(sets, found):
        for name, values in evaluator.per_query(prompted, method.score).items():
            torch.testing.assert_close(metrics[name], values, rtol=0, atol=0)
    assert n_rankings < n_queries if kind != "base" else n_rankings == len(sequences.positions)
    assert evaluator.rows("m", method, sets)[3]["metrics"]["NDCG@10"] == pytest.approx(float(found[3]["NDCG@10"].mean()))


@pytest.mark.parametrize("backbone", [CausalSASRec, CausalGRU4Rec])
def test_states_are_the_backbones_own(case, backbone):
    rng, sequences, evaluator = case
    sizes = {"hidden_size": 16, "inner_size": 24, "n_layers": 3, "n_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02}
    more = {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5, "embedding_size": 16, "num_layers": 2, "dropout_prob": 0.5, "loss_type": "CE"}
    torch.manual_seed(0)
    config = {**sizes, **more, **NAMES, "MAX_ITEM_LIST_LENGTH": L}
    model = backbone(config, ItemVocabulary(V, config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    positions = rng.permutation(sequences.positions)
    found = evaluator.states(model, positions)
    for position, state in zip(positions, found):  # one by one: no padding, no neighbours
        item_seq, lengths = map(torch.from_numpy, sequences.histories(np.array([position]), L))
        with torch.no_grad():
            torch.testing.assert_close(state, model.encode(item_seq, lengths)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_state_of_a_history_is_recboles(case, activation):
    _, sequences, _ = case
    sizes = {"hidden_size": 8, "inner_size": 12, "n_layers": 2, "n_heads": 2, "hidden_act": activation, "layer_norm_eps": 1e-12, "initializer_range": 0.5}
    config = {**sizes, **NAMES, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1, "loss_type": "CE", "MAX_ITEM_LIST_LENGTH": L}
    model, recboles = (kind(config, ItemVocabulary(V, config)).eval() for kind in (CausalSASRec, SASRec))
    recboles.load_state_dict(model.state_dict())
    history = [torch.from_numpy(array) for array in sequences.histories(sequences.positions[:5], L)]
    torch.testing.assert_close(model.encode(*history), recboles.forward(*history))
