"""Backbones: RecBole's own forward and losses, whole sequences or sampled histories."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import BERT4Rec, GRU4Rec, NARM
from recbole.utils import get_model

import tiny
from recbole_dpr.cli import main
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TRAIN
from recbole_dpr.data.loaders import PackedLoader, PrefixBatch, PrefixLoader, TrainingPrompts
from recbole_dpr.errors import UserError
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary, WholeHistory, check_backbone
from recbole_dpr.model.dpr import INTENT, PROMPT
from recbole_dpr.model.losses import softmax_cross_entropy
from recbole_dpr.prompts.bank import PromptTable
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE

L, D = 60, 12  # no training part of the tiny dataset is longer than L
WHOLE = ("NARM", "STAMP", "SRGNN", "GCSAN", "LightSANs", "SINE", "NextItNet", "CORE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_texts(tmp_path_factory.mktemp("data"))
    tiny.write(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    config = make_config("DPR_SASRec", "tiny", (), tiny.settings(folder))
    return read_sequences(config)


def build(folder, data, name, length=L, **keys):
    """An untrained DPR_<name> with 2 random prompts and random fusion weights; dropout off."""
    model = f"DPR_{name}"
    config = make_config(model, "tiny", (), tiny.settings(folder, model, **{"MAX_ITEM_LIST_LENGTH": length, "softmax_precision": "float32", "backbone_precision": "float32", **keys}))
    config["prompt_size"], config["n_categories"] = D, 4
    torch.manual_seed(1)
    model = promptable(model)(config, ItemVocabulary(data.n_items, config)).eval()
    for name, parameter in model.named_parameters():
        if not model.is_backbone(name) or name == "output_bias":  # BERT4Rec's starts at 0
            torch.nn.init.normal_(parameter, std=0.2)
    model.attach_prompts(PromptTable(torch.nn.functional.normalize(torch.randn(2, D), dim=1)))
    return model


def interaction(sequences, positions, length=L, **fields):
    """RecBole's rows for the items at these positions, each with the items before it, padded to `length`."""
    item_seq, lengths = sequences.histories(positions, length)
    item_seq = np.pad(item_seq, ((0, 0), (0, length - item_seq.shape[1])))
    arrays = {"item_id_list": item_seq, "item_length": lengths, "item_id": sequences.items[positions]}
    return Interaction({**{name: torch.from_numpy(a) for name, a in arrays.items()}, **fields})


def prefix_batch(sequences, positions, length=L):
    item_seq, lengths = map(torch.from_numpy, sequences.histories(positions, length))
    return PrefixBatch(item_seq, torch.arange(len(positions)), torch.from_numpy(sequences.items[positions]), [], lengths)


# --- GRU4Rec: all positions at once


def test_gru4rec_states_are_recboles_forward(folder, data):
    model, sequences = build(folder, data, "GRU4Rec"), data
    item_seq, lengths = map(torch.from_numpy, sequences.histories(sequences.train_end[:6], L))
    with torch.no_grad():
        states = model.states(item_seq)
        for length in (1, 7, int(lengths.min())):
            prefix = torch.zeros_like(item_seq)
            prefix[:, :length] = item_seq[:, :length]
            torch.testing.assert_close(states[:, length - 1], GRU4Rec.forward(model, prefix, torch.full((6,), length)))


def test_gru4rec_stage1_loss_is_recboles_loss(folder, data):
    model, sequences = build(folder, data, "GRU4Rec"), data
    start, end = sequences.bounds(TRAIN)
    position = np.concatenate([np.arange(s + 1, e) for s, e in zip(start, end)])
    total = count = 0
    with torch.no_grad():
        expected = GRU4Rec.calculate_loss(model, interaction(sequences, position))
        for batch in PackedLoader(sequences, L, 300, 0):
            (loss,) = model.calculate_loss(batch)
            total, count = total + loss * len(batch.rows), count + len(batch.rows)
    assert count == len(position)
    torch.testing.assert_close(total / count, expected, atol=1e-5, rtol=1e-5)


# --- BERT4Rec


def test_bert4rec_answers_as_recboles_where_the_history_fills_its_length(folder, data):
    model, sequences = build(folder, data, "BERT4Rec", length=10), data
    rows = interaction(sequences, sequences.valid_end[:5], 10)
    assert (rows["item_length"] == 10).all()
    with torch.no_grad():
        torch.testing.assert_close(model.full_sort_predict(rows), BERT4Rec.full_sort_predict(model, rows))
        torch.testing.assert_close(model.predict(rows), BERT4Rec.predict(model, rows))


def test_bert4rec_keeps_the_oldest_item_of_a_short_history(folder, data):
    """RecBole drops one item of every history: put before ours, it is the one that goes."""
    model, sequences = build(folder, data, "BERT4Rec"), data
    for n in (1, 2, 5):
        rows = interaction(sequences, sequences.offsets[:5] + n)
        longer = Interaction({"item_id_list": torch.zeros(5, L, dtype=torch.int64), "item_length": rows["item_length"] + 1})
        longer["item_id_list"][:, 0] = 7
        longer["item_id_list"][:, 1:] = rows["item_id_list"][:, :-1]
        with torch.no_grad():
            torch.testing.assert_close(model.full_sort_predict(rows), BERT4Rec.full_sort_predict(model, longer))
            alone = model.full_sort_predict(interaction(sequences, sequences.offsets[:5] + 1))
        assert n > 1 or not torch.allclose(alone[0], alone[1])  # not from the mask alone


def test_bert4rec_rows_of_one_batch_do_not_touch_each_other(folder, data):
    """Full and short histories side by side: each as on its own."""
    model, sequences = build(folder, data, "BERT4Rec", length=10), data
    positions = np.array([sequences.offsets[0] + 3, sequences.valid_end[1], sequences.offsets[2] + 9, sequences.offsets[3] + 10])
    with torch.no_grad():
        together = model.encode(*map(torch.from_numpy, sequences.histories(positions, 10)))
        for n, position in enumerate(positions):
            torch.testing.assert_close(together[n], model.encode(*map(torch.from_numpy, sequences.histories([position], 10)))[0])


def test_bert4rec_masked_loss_is_recboles_loss(folder, data):
    model, sequences = build(folder, data, "BERT4Rec"), data
    batch = prefix_batch(sequences, sequences.train_end[:8] - 1)
    torch.manual_seed(0)
    masked = (torch.rand(batch.item_seq.shape) < 0.3) & (batch.item_seq > 0)
    masked[:, 0] = False  # RecBole pads indices with 0, and so never counts the first item
    n = int(masked.sum(1).max())
    index, items = torch.zeros(8, n, dtype=torch.int64), torch.zeros(8, n, dtype=torch.int64)
    for b in range(8):
        at = torch.nonzero(masked[b]).squeeze(1)
        index[b, n - len(at) :], items[b, n - len(at) :] = at, batch.item_seq[b, at]
    # RecBole's masking writes the names of these fields into the config
    model.MASK_ITEM_SEQ, model.POS_ITEMS, model.NEG_ITEMS, model.MASK_INDEX = "masked", "pos", "neg", "index"
    fields = {"masked": batch.item_seq.masked_fill(masked, sequences.n_items), "pos": items, "neg": items, "index": index}
    with torch.no_grad():
        torch.testing.assert_close(model.masked_loss(batch.item_seq, masked), BERT4Rec.calculate_loss(model, Interaction(fields)))


def test_bert4rec_masks_what_its_keys_say(folder, data, monkeypatch):
    model, sequences = build(folder, data, "BERT4Rec", mask_ratio=0.3, ft_ratio=0.25), data
    start, end = sequences.bounds(TRAIN)
    batch, drawn = prefix_batch(sequences, np.concatenate([np.arange(s + 1, e) for s, e in zip(start, end)])[::3]), []
    monkeypatch.setattr(model, "masked_loss", lambda sequence, masked, dtype: drawn.append((sequence, masked)))
    torch.manual_seed(0)
    for _ in range(200):
        model.pretraining_loss(batch, None)
    last = torch.arange(drawn[0][0].shape[1]) == batch.lengths[:, None]
    only_last = [torch.equal(masked, last) for _, masked in drawn]
    assert 0.15 < np.mean(only_last) < 0.35
    for sequence, masked in drawn:
        assert torch.equal(sequence[last], batch.targets) and torch.equal(sequence[:, :-1][~last[:, :-1]], batch.item_seq[~last[:, :-1]])
        assert not masked[sequence == 0].any()
    shares = [masked[sequence > 0].float().mean() for (sequence, masked), fine_tuning in zip(drawn, only_last) if not fine_tuning]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.005) and np.std(shares) > 0


def test_bert4rec_fine_tuning_is_the_task_it_answers(folder, data):
    model, sequences = build(folder, data, "BERT4Rec", ft_ratio=1.0), data
    batch = prefix_batch(sequences, sequences.train_end - 1)
    with torch.no_grad():
        scores = model.encode(batch.item_seq, batch.lengths) @ model.item_matrix().T
        torch.testing.assert_close(model.calculate_loss(batch)[0], torch.nn.functional.cross_entropy(scores, batch.targets))


def test_a_batch_without_a_mask_costs_nothing(folder, data):
    model, sequences = build(folder, data, "BERT4Rec"), data
    batch = prefix_batch(sequences, sequences.train_end[:2] - 1)
    loss = model.masked_loss(batch.item_seq, torch.zeros_like(batch.item_seq, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not model.item_embedding.weight.grad.any()


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_bias_of_bert4rec_passes_the_fusion(folder, data, decoupled):
    """A prompted score has the item bias once, beside the fused state's product."""
    model, sequences = build(folder, data, "BERT4Rec", decouple_backbone=decoupled, item_text=False), data
    rows = interaction(sequences, sequences.valid_end[:4], **{PROMPT: torch.tensor([0, 1, 0, 1]), INTENT: torch.tensor([0, 0, 1, 1])})
    with torch.no_grad():
        unprompted, state = (m.encode(rows["item_id_list"], rows["item_length"]) for m in (model, model.answering))
        keys = model.projector(model.prompt_vectors[rows[PROMPT]])[:, None]
        fused = model.tower(rows[INTENT], state[:, :-1], keys, None)
        expected = fused @ model.answering.item_embedding.weight[:-1].T + model.answering.output_bias
        if decoupled:
            expected += 0.125 * (unprompted[:, :-1] @ model.item_embedding.weight[:-1].T + model.output_bias)
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
    assert model.output_bias.abs().min() > 0


# --- any other model of RecBole


@pytest.mark.parametrize("name", WHOLE)
def test_without_a_prompt_it_is_recboles_model(folder, data, name):
    """States times item vectors are RecBole's scores, on a history as short as it comes too."""
    model, sequences, own = build(folder, data, name), data, get_model(name)
    rows = interaction(sequences, np.append(sequences.valid_end[:4], sequences.offsets[0] + 1))
    short = rows["item_id_list"][:, : int(rows["item_length"].max())]
    with torch.no_grad():
        expected = own.full_sort_predict(model, rows)
        torch.testing.assert_close(model.encode(short, rows["item_length"]) @ model.item_matrix().T, expected)
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
    assert expected.std() > 0


@pytest.mark.parametrize("name", ["NARM", "STAMP", "CORE"])
def test_item_vectors_carry_the_gradient(folder, data, name):
    """Through our cross-entropy as through RecBole's own, item vectors read off its scores included."""
    model, sequences = build(folder, data, name, **({"item_dropout": 0.0} if name == "CORE" else {})), data
    batch = prefix_batch(sequences, sequences.train_end[:20] - 1)
    (theirs,) = model.calculate_loss(batch)
    ours = softmax_cross_entropy(model.encode(batch.item_seq, batch.lengths), model.item_matrix(), batch.targets)
    torch.testing.assert_close(ours, theirs)
    trained = [p for n, p in model.named_parameters() if model.is_backbone(n)]
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_stage1_is_the_backbones_own_loss(folder, data):
    """GCSAN regularises its item embeddings: that is part of it."""
    model, sequences = build(folder, data, "GCSAN", reg_weight=50.0), data
    positions = sequences.train_end[:20] - 1
    with torch.no_grad():
        (loss,) = model.calculate_loss(prefix_batch(sequences, positions))
        torch.testing.assert_close(loss, get_model("GCSAN").calculate_loss(model, interaction(sequences, positions))[0])
        states = model.encode(*map(torch.from_numpy, sequences.histories(positions, L)))
        bare = softmax_cross_entropy(states, model.item_matrix(), torch.from_numpy(sequences.items[positions]))
    assert loss > bare + 0.1


@pytest.mark.parametrize(
    ("method", "own", "said"),
    [
        ("full_sort_predict", lambda model, rows: NARM.full_sort_predict(model, rows) ** 3, "no dot products"),
        ("forward", lambda model, item_seq, item_seq_len: model.item_embedding(item_seq), r"gives \[2, 60, 16\]"),
    ],
)
def test_a_model_of_another_form_is_refused(folder, method, own, said):
    """RecBole's own of these forms are refused for their arguments already."""
    other = type("OtherNARM", (WholeHistory, type("Other", (NARM,), {method: own})), {"name": "Other", "takes_length": True})
    config = make_config("DPR_NARM", "tiny", (), tiny.settings(folder, "DPR_NARM", MAX_ITEM_LIST_LENGTH=L))
    with pytest.raises(UserError, match=f"backbone 'Other' cannot be wrapped: .*{said}"):
        check_backbone(other, config)


def test_a_backbones_own_temperature_is_not_applied_twice(folder, data):
    assert build(folder, data, "CORE").prompt_temperature == 1.0
    assert build(folder, data, "CORE").temperature == 0.07
    assert build(folder, data, "NARM", temperature=0.5).prompt_temperature == 0.5


@pytest.mark.parametrize("name", ["BERT4Rec", "NARM"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_prompts_train(folder, data, name, frozen):
    model, sequences = build(folder, data, name, item_text=False, loss_weights={"seq": 1.0, "pos": 1.0, "neg": 1.0}), data
    config = make_config("DPR_NARM", "tiny", (), tiny.settings(folder, "DPR_NARM"))
    bank = prepare_queries(config, sequences).bank
    model.attach_prompts(PromptTable(torch.randn(len(bank.all_texts), D)))
    batch = next(iter(PrefixLoader(sequences, L, 4, 50, 0, TrainingPrompts(sequences, bank, config, {"category": 1.0}))))
    model.train_backbone = not frozen
    losses = model.calculate_loss(batch)
    assert len(losses) == (2 if frozen else 3)
    sum(losses).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(map(model.is_backbone, trained))
    assert any(n.startswith("prompted_backbone.item_embedding") for n in trained) == (not frozen)
    assert any(n.startswith("tower.") for n in trained)


# --- sampled histories


def test_histories_are_the_items_before_their_targets(data):
    numbered = replace(data, items=np.arange(len(data.items)) + 1)  # the item at position p is p + 1
    for batch in PrefixLoader(numbered, 10, 4, 50, 3):
        assert len(batch.targets) <= 50 and batch.rows.tolist() == list(range(len(batch.targets)))
        for history, length, position in zip(batch.item_seq, batch.lengths.tolist(), (batch.targets - 1).tolist()):
            user = numbered.user_of[position]
            start = numbered.offsets[user]
            assert start < position < numbered.train_end[user]
            assert history[:length].tolist() == list(range(max(start, position - 10) + 1, position + 1)) and not history[length:].any()


def test_every_stretch_gives_its_share_of_targets(data):
    """Of 10 positions 4 in an epoch, all where they are fewer; never the same target twice; anew in the next epoch."""
    sequences = data
    start, end = sequences.bounds(TRAIN)
    n_inputs = end - start - 1
    loader = PrefixLoader(sequences, 10, 4, 50, 3)
    epochs = []
    for loader.epoch in (0, 1, 0):
        batches = list(loader)
        assert len(batches) == len(loader)
        epochs.append([(b.item_seq[:, 0].tolist(), b.lengths.tolist(), b.targets.tolist()) for b in batches])
        found = [tuple(h[:n].tolist()) + (int(t),) for b in batches for h, n, t in zip(b.item_seq, b.lengths, b.targets)]
        assert len(set(found)) == len(found) == sum(4 * (n // 10) + min(4, n % 10) for n in n_inputs.tolist())
    assert epochs[0] == epochs[2] != epochs[1]


def test_all_histories_are_all_targets(data):
    sequences = data
    start, end = sequences.bounds(TRAIN)
    found = torch.cat([b.targets for b in PrefixLoader(sequences, 10, 10, 64, 0)])
    assert sorted(found.tolist()) == sorted(np.concatenate([sequences.items[s + 1 : e] for s, e in zip(start, end)]).tolist())


def test_prompts_of_histories_comply(folder, data):
    config, sequences = make_config("DPR_NARM", "tiny", (), tiny.settings(folder, "DPR_NARM")), data
    bank = prepare_queries(config, sequences).bank
    for batch in PrefixLoader(sequences, L, 4, 50, 5, TrainingPrompts(sequences, bank, config, {"category": 1.0})):
        for part, intent in zip(batch.prompted, (POSITIVE, NEGATIVE)):
            assert part.intent == intent and len(part.rows)
            for at, items, prompt in zip(part.rows, part.targets.numpy(), part.prompt):
                c = next(i for i, name in enumerate(sequences.category_names) if name in bank.all_texts[prompt].lower())
                has = sequences.categories[items[items > 0], c]
                assert has.all() if intent == POSITIVE else not has.any()
                assert sequences.categories[batch.targets[at], c] == (intent == NEGATIVE)


# --- wrong inputs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=DPR"], "--backbone=NARM"),
        (["--model=DPR", "--backbone=NARN"], "'NARM'"),
        (["--model=DPR", "--backbone=BPR"], "unknown backbone 'BPR'"),
        (["--model=DPR", "--backbone=Caser"], "user, item_seq"),
        (["--model=DPR", "--backbone=FEARec"], "inter_feat"),
        (["--model=DPR_RepeatNet"], "no item_embedding"),
        (["--model=DPR_NARN"], "DPR_NARM"),
        (["--model=DPR_SASRec", "--backbone=NARM"], "--model=DPR --backbone=NARM"),
        (["--model=NARM", "--backbone=NARM"], "--model=DPR --backbone=NARM"),
        (["--model=DPR_NARM", "--prefixes_per_sequence=0"], "prefixes_per_sequence"),
        (["--model=DPR_NARM", "--loss_type=BPR"], "cross-entropy"),
        (["--model=DPR_NARM", "--fusion_heads=3"], "embedding_size=64"),
        (["--model=DPR_NARM", "--mask_ratio=0.1"], "mask_ratio"),
        (["--model=DPR_BERT4Rec", "--mask_ratio=1.5"], "mask_ratio"),
        (["--model=DPR_BERT4Rec", "--ft_ratio=2"], "ft_ratio"),
        (["--model=DPR_LightSANs", "--n_heads=3"], "attention heads"),
        (["--model=DPR_BERT4Rec", "--n_heads=3"], "attention heads"),
        (["--model=NARM", "--prefixes_per_sequence=4"], "for DPR models"),
    ],
)
def test_wrong_inputs(folder, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dataset=tiny", f"--data_path={folder}", *arguments]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())
