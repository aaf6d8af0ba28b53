"""DPR keeps RecBole's contract; training on all positions equals RecBole's loss over the same targets."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec

import tiny
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import NO_ITEM, TRAIN
from recbole_dpr.data.loaders import PackedBatch, PackedLoader, PromptedTargets, TrainingPrompts
from recbole_dpr.evaluation import methods
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.model import MODELS
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.model.dpr import INTENT, PROMPT
from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable
from recbole_dpr.prompts.item_text import LikelihoodText
from recbole_dpr.prompts.meaning import MeaningReader
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE

D, P = 12, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder)
    config = make_config("DPR_SASRec", "tiny", (), tiny.settings(folder, MAX_ITEM_LIST_LENGTH=60, train_batch_size=300, softmax_precision="float32", backbone_precision="float32"))
    sequences = read_sequences(config)
    return config, sequences, ItemVocabulary(sequences.n_items, config)


def build(data, **keys):
    """An untrained model with random weights in the fusion, random prompts and items; dropout off."""
    config, sequences, dataset = data
    settings = {"prompt_size": D, "n_categories": 4, **keys}
    before = {key: config[key] for key in settings}
    for key, value in settings.items():
        config[key] = value
    torch.manual_seed(1)
    model = MODELS["DPR_SASRec"](config, dataset).eval()
    for key, value in before.items():
        config[key] = value
    for parameter in model.fusion_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    phrases = np.arange(3 * sequences.n_items).reshape(-1, 3)
    vectors = torch.nn.functional.normalize(torch.randn(max(P, phrases.size), D), dim=1)
    phrases[0] = NO_PROMPT
    bank = SimpleNamespace(phrase=phrases, about=phrases[:, 0], asked=PromptTable(torch.randn(phrases.size, D)))
    if model.item_weights is not None:
        readers = [(torch.randn(D, 5), torch.randn(5)) for _ in range(2)]
        meaning = MeaningReader(D, 4)
        for value in meaning.buffers():
            value.normal_()
        model.attach_items(LikelihoodText(bank), torch.from_numpy(sequences.categories), readers, meaning)
    model.attach_prompts(PromptTable(vectors))
    return model


def test_states_are_recboles_forward(data):
    """The state at every position equals RecBole's forward on the prefix that ends there."""
    model, sequences = build(data), data[1]
    item_seq, lengths = map(torch.from_numpy, sequences.histories(sequences.train_end[:6], 60))
    with torch.no_grad():
        states = model.states(item_seq)
        for length in (1, 7, int(lengths.min())):
            prefix = torch.zeros_like(item_seq)
            prefix[:, :length] = item_seq[:, :length]
            expected = model.forward(prefix, torch.full((6,), length))
            torch.testing.assert_close(states[:, length - 1], expected, atol=1e-5, rtol=1e-4)


def test_all_positions_loss_is_recboles_loss(data):
    """Every training target once: the mean over our packed batches equals SASRec.calculate_loss on prefix rows."""
    config, sequences, _ = data
    model = build(data)
    start, end = sequences.bounds(TRAIN)
    position = np.concatenate([np.arange(s + 1, e) for s, e in zip(start, end)])
    item_seq, lengths = sequences.histories(position, 60)
    rows = Interaction(
        {
            "item_id_list": torch.from_numpy(item_seq),
            "item_length": torch.from_numpy(lengths),
            "item_id": torch.from_numpy(sequences.items[position]),
        }
    )
    total = count = 0
    with torch.no_grad():
        expected = SASRec.calculate_loss(model, rows)
        for batch in PackedLoader(sequences, 60, 300, 0):
            (loss,) = model.calculate_loss(batch)
            total, count = total + loss * len(batch.rows), count + len(batch.rows)
    assert count == len(position)
    torch.testing.assert_close(total / count, expected, atol=1e-5, rtol=1e-5)


def test_loader_gives_every_target_once(data):
    _, sequences, _ = data
    for max_length in (5, 60):
        loader = PackedLoader(sequences, max_length, 200, (1, 2))
        seen = []
        for batch in loader:
            assert batch.item_seq.shape[1] <= max_length
            assert batch.item_seq.numel() <= 200
            flat = batch.item_seq.reshape(-1)
            assert (flat[batch.rows] > 0).all() and (flat > 0).sum() == len(batch.rows)
            seen.append(torch.stack([flat[batch.rows], batch.targets], dim=1))
        start, end = sequences.bounds(TRAIN)
        expected = np.concatenate([np.stack([sequences.items[s : e - 1], sequences.items[s + 1 : e]], axis=1) for s, e in zip(start, end)])
        assert sorted(map(tuple, torch.cat(seen).tolist())) == sorted(map(tuple, expected.tolist()))


def test_epochs_differ_and_repeat(data):
    loader = PackedLoader(data[1], 60, 300, 7)
    first = [b.targets.tolist() for b in loader]
    loader.epoch = 1
    second = [b.targets.tolist() for b in loader]
    loader.epoch = 0
    assert first == [b.targets.tolist() for b in loader]
    assert first != second


def prompts_of(sequences, intent, n=50, k=3):
    torch.manual_seed(3)
    targets = torch.randint(1, sequences.n_items, (n, k))
    targets[::2, 1:] = NO_ITEM
    phrase = torch.randint(0, 3, (n,))
    phrase[::3] = NO_PROMPT
    return PromptedTargets(
        intent, torch.randint(0, 120, (n,)), targets, torch.randint(0, P, (n,)), torch.randint(1, sequences.n_items, (n,)), phrase
    )


@pytest.mark.parametrize("item_text, two_towers", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("intent", [POSITIVE, NEGATIVE])
def test_prompted_loss_is_the_plain_softmax(data, intent, item_text, two_towers):
    """Fast path against scores written out, with the phrase left out of its own item row by row."""
    model, sequences = build(data, item_text=item_text, two_towers=two_towers, temperature=0.5), data[1]
    if item_text:  # half of the prompts name a category, beyond doubt
        logits = model.prompt_vectors.vectors @ model.category_reader[:, :-1] + model.category_reader[:, -1:]
        model.category_reader[:, -1, -1] += (logits[..., :-1].amax(2) - logits[..., -1]).median(1).values
        model.category_reader.mul_(60)
    model.heard = model.named  # what prompts mean without a name is heard in requests, not in training
    part = prompts_of(sequences, intent)
    state = torch.randn(120, 16)
    with torch.no_grad():
        if item_text:
            naming = model.named(model.prompt_vectors[part.prompt], part.intent)[:, -1] < 1e-8
            assert 0 < naming.sum() < len(naming)
        found = model._prompted_loss(state, model.item_embedding.weight, part)
        vectors = model.prompted_vectors(state[part.rows], state[part.rows], model.prompt_vectors[part.prompt], part.intent)
        fused, side = vectors[:, 16:32], vectors[:, 32:]  # behind the unprompted stretch
        losses = []
        for n in range(len(part.rows)):
            items = model.item_side.clone()
            if item_text and part.own_number[n] != NO_PROMPT:
                item = part.own_item[n]
                left = model.item_text.without(item[None], model.prompt_vectors[model.item_text.phrases[item, part.own_number[n]]][None])
                items[item, : D + 1] = torch.cat([left[0][0], left[1]])
            log_p = ((fused[n] @ model.item_embedding.weight.T + side[n] @ items.T) / 0.5).log_softmax(0)
            targets = part.targets[n][part.targets[n] != NO_ITEM]
            losses.append(-log_p[targets].mean())
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_of_what_was_attached_before(data):
    """The loss after items or prompts are attached again is that of a model which never had others."""
    part = prompts_of(data[1], POSITIVE)
    state, loss = torch.randn(120, 16), lambda model: model._prompted_loss(state, model.item_embedding.weight, part)
    model = build(data)
    expected, text, side = loss(model), model.item_text, model.item_side.clone()
    other = SimpleNamespace(vectors=100 * text.vectors, offsets=100 * text.offsets, phrases=text.phrases, without=text.without)
    readers = [(reader[:-1], reader[-1]) for reader in model.category_reader.clone()]
    meaning = copy.deepcopy(model.meaning_reader)
    model.attach_items(other, side[:, D + 1 :], readers, meaning)
    assert abs(loss(model) - expected) > 1e-3
    model.attach_items(text, side[:, D + 1 :], readers, meaning)
    torch.testing.assert_close(loss(model), expected)
    known = model.prompt_vectors
    model.attach_prompts(PromptTable(known.vectors.flip(0)))
    assert abs(loss(model) - expected) > 1e-3
    model.attach_prompts(known)
    torch.testing.assert_close(loss(model), expected)


def interaction(sequences, **fields):
    item_seq, lengths = map(torch.from_numpy, sequences.histories(sequences.valid_end[:5], 60))
    return Interaction({"item_id_list": item_seq, "item_length": lengths, "item_id": torch.arange(1, 6), **fields})


def test_without_a_prompt_it_is_the_backbone(data):
    model, rows = build(data), interaction(data[1])
    with torch.no_grad():
        torch.testing.assert_close(model.full_sort_predict(rows), SASRec.full_sort_predict(model, rows))
        torch.testing.assert_close(model.predict(rows), SASRec.predict(model, rows))
        torch.testing.assert_close(model.calculate_loss(rows), SASRec.calculate_loss(model, rows))


@pytest.mark.parametrize("decoupled", [True, False])
def test_with_prompts_one_dot_product_for_each_item(data, decoupled):
    model = build(data, decouple_backbone=decoupled)
    assert (model.answering is model) == (not decoupled)
    rows = interaction(data[1], **{PROMPT: torch.tensor([0, 1, 2, 3, 4]), INTENT: torch.tensor([0, 1, 0, 1, 1])})
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
        unprompted, state = (m.forward(rows["item_id_list"], rows["item_length"]) for m in (model, model.answering))
        for n in range(5):
            intent, prompt = int(rows[INTENT][n]), model.prompt_vectors.vectors[n : n + 1]
            fused, weights = model.fuse(state[n : n + 1], prompt, model.heard(prompt, intent), intent)
            texts, categories = model.item_side[:, :D], model.item_side[:, D + 1 :]
            text = weights[:, :1] * (prompt @ texts.T + model.item_side[:, D])
            expected = fused @ model.answering.item_embedding.weight.T + text + weights[:, 1:] @ categories.T
            if decoupled:
                expected += 0.125 * unprompted[n] @ model.item_embedding.weight.T
            torch.testing.assert_close(scores[n], expected[0])
        torch.testing.assert_close(model.predict(rows), scores[torch.arange(5), rows["item_id"]])
    assert (scores - SASRec.full_sort_predict(model, rows)).abs().max() > 0.1


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("item_text", [True, False])
def test_the_evaluators_scores_are_the_models(data, item_text, decoupled):
    """With the fit of the text once for each distinct prompt, of which several rows of the table are the same."""
    model, sequences = build(data, item_text=item_text, decouple_backbone=decoupled), data[1]
    known = model.prompt_vectors.vectors
    model.attach_prompts(PromptTable(known, torch.arange(len(known)) // 3))
    rows = interaction(sequences)
    states = [m.encode(rows["item_id_list"], rows["item_length"]) for m in (model, model.answering)]
    method = methods.Prompted(*(lambda prompted, at, s=state: s[at] for state in states), model)
    prompt = np.array([0, 1, 2, 7, 8])
    for task, intent in (("POS", POSITIVE), ("NEG", NEGATIVE)):
        prompted = SimpleNamespace(kind="tag", prompt=prompt, queries=SimpleNamespace(intent=intent))
        asked = interaction(sequences, **{PROMPT: torch.from_numpy(prompt), INTENT: torch.full((5,), intent)})
        with torch.no_grad():
            torch.testing.assert_close(method.score(prompted, np.arange(5)), model.full_sort_predict(asked))
    with torch.no_grad():
        torch.testing.assert_close(method.score(SimpleNamespace(kind="none"), np.arange(5)), model.full_sort_predict(rows))


def test_prompts_without_a_name_are_heard_by_what_they_mean(data):
    model = build(data)
    prompt = torch.cat([model.prompt_vectors.vectors[:4], 40 * model.prompt_vectors.vectors[:4]])  # far beyond any doubt, too
    meant = model.meaning_reader(prompt)
    assert 0.01 < meant[:4].std()  # it depends on the prompt
    model.category_reader[:, -1] += torch.tensor([0.0, 0.0, 0.0, 0.0, 1e4])  # nobody names any
    wanted, avoided = (model.heard(prompt, intent) for intent in (POSITIVE, NEGATIVE))
    torch.testing.assert_close(wanted, torch.cat([0.1 * meant, torch.ones(8, 1)], dim=1))
    torch.testing.assert_close(avoided, torch.cat([1.5 * meant, (1 - meant).prod(1, keepdim=True)], dim=1))
    intent = torch.tensor([0, 1] * 4)
    torch.testing.assert_close(model.heard(prompt, intent), torch.where(intent[:, None] == 0, wanted, avoided))
    model.category_reader[:, -1] -= torch.tensor([0.0, 0.0, 0.0, 0.0, 2e4])  # everybody names one: that is what is heard
    for intent in (POSITIVE, NEGATIVE):
        torch.testing.assert_close(model.heard(prompt, intent), model.named(prompt, intent))


def test_what_prompts_mean_is_known_after_loading(data):
    model, other = build(data), build(data)
    for value in other.meaning_reader.buffers():
        value.zero_()
    other.load_state_dict(model.state_dict())
    prompt = model.prompt_vectors.vectors[:5]
    torch.testing.assert_close(other.heard(prompt, NEGATIVE), model.heard(prompt, NEGATIVE), rtol=0, atol=0)


def test_older_models_keep_their_reader(data):
    """Those whose reader was a linear map, and those from before there was any, which hear names alone; none may be in part."""
    model, other = build(data), build(data)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("meaning_reader.")}
    prompt, linear = model.prompt_vectors.vectors[:5], torch.randn(D + 1, 4)
    other.load_state_dict({**own, "meaning_reader": linear})
    torch.testing.assert_close(other.meaning_reader(prompt), torch.sigmoid(prompt @ linear[:-1] + linear[-1]))
    other.meaning_reader = MeaningReader(D, 4)
    other.load_state_dict(own)
    for intent in (POSITIVE, NEGATIVE):
        torch.testing.assert_close(other.heard(prompt, intent), other.named(prompt, intent))
    with pytest.raises(RuntimeError, match="meaning_reader.output"):
        other.load_state_dict({name: value for name, value in model.state_dict().items() if name != "meaning_reader.output"})


def test_prompted_backbone_starts_as_a_copy(data):
    model, rows = build(data), interaction(data[1])
    history = rows["item_id_list"], rows["item_length"]
    with torch.no_grad():
        assert not torch.allclose(model.answering.forward(*history), model.forward(*history))
        model.start_prompting()
        torch.testing.assert_close(model.answering.forward(*history), model.forward(*history))
        model.answering.item_embedding.weight += 1
        assert not torch.allclose(model.answering.forward(*history), model.forward(*history))


def test_token_keys_run_and_matter(data):
    model = build(data, prompt_keys="token")
    lengths = torch.randint(1, 6, (P,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    flat = torch.randn(int(offsets[-1]), D).half()
    model.attach_prompts(model.prompt_vectors, (flat, offsets))
    keys, padding = model.tokens_of(torch.tensor([3, 8]))
    for row, p in enumerate((3, 8)):
        torch.testing.assert_close(keys[row][~padding[row]], flat[offsets[p] : offsets[p + 1]].float())
    part = prompts_of(data[1], POSITIVE)
    loss = model._prompted_loss(torch.randn(120, 16), model.item_embedding.weight, part)
    loss.backward()
    assert model.tower.experts[0].attention.in_proj_weight.grad[:16].abs().max() > 0  # the query now has a say


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_prompts_train(data, decoupled, frozen):
    """A frozen backbone gets no gradient; a decoupled one's unprompted twin never does."""
    model = build(data, decouple_backbone=decoupled)
    model.train_backbone = not frozen
    batch = next(iter(PackedLoader(data[1], 60, 300, 0)))
    batch.prompted = [prompts_of(data[1], POSITIVE, 20)]
    sum(model.calculate_loss(batch)).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(map(model.is_backbone, trained)) == (not frozen and not decoupled)
    assert any(name.startswith("prompted_backbone.") for name in trained) == (not frozen and decoupled)
    assert any(p.grad is not None for p in model.fusion_parameters())


def test_training_prompts_say_what_the_target_is(data):
    """Category prompts name the category; POS targets have it and the next item has not, NEG targets lack it."""
    config, sequences, dataset = data
    bank = prepare_queries(config, sequences).bank
    texts = bank.all_texts
    for batch in PackedLoader(sequences, 60, 300, 5, TrainingPrompts(sequences, bank, config, {"category": 1.0})):
        next_item = np.zeros(batch.item_seq.numel(), dtype=np.int64)
        next_item[batch.rows] = batch.targets
        for part, intent in zip(batch.prompted, (POSITIVE, NEGATIVE)):
            assert part.intent == intent
            for row, items, prompt in zip(part.rows, part.targets.numpy(), part.prompt):
                c = next(i for i, name in enumerate(sequences.category_names) if name in texts[prompt].lower())
                items = items[items != NO_ITEM]
                assert len(items)
                has = sequences.categories[items, c]
                assert has.all() and len(items) == 1 if intent == POSITIVE else not has.any()
                assert sequences.categories[next_item[row], c] == (intent == NEGATIVE)


def test_a_packed_batch_moves_as_a_whole(data):
    batch = next(iter(PackedLoader(data[1], 60, 300, 0)))
    batch.prompted = [prompts_of(data[1], POSITIVE, 5)]
    moved = batch.to("meta")
    assert isinstance(moved, PackedBatch)
    assert moved.prompted[0].targets.device.type == moved.item_seq.device.type == "meta"
