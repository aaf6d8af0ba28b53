"""A trained model that answers: histories and prompts in, ranked items out.

Legend: B requests, V items without padding, d size of the retrieval vectors.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recbole_dpr.errors import UserError, unknown
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.prompts.encoder import PromptEncoder
from recbole_dpr.prompts.intent import NLI_MODEL, SPLITTING, Clause, parse_prompt, router
from recbole_dpr.serving import known_users
from recbole_dpr.serving.clause_parts import ClauseParts
from recbole_dpr.serving.prompt_vectors import PromptVectors
from recbole_dpr.serving.user_tower import UserTower
from recbole_dpr.train.checkpoints import replacing

FORMAT = 1  # of model.json
MAX_PROMPT = 1000  # characters; the encoder reads 64 tokens of a clause
_PROMPTS_KEPT = 10_000  # whose clauses stay in memory
_AT_ONCE = 64  # requests answered together: larger batches leave the processor's cache


@dataclass(frozen=True)
class Recommendations:
    """What was recommended, best first.

    Attributes:
        items: external ids; titles: theirs ("" where the dataset has none); categories: lists of names; scores: floats.
        intents: "positive" / "negative" of each clause of the prompt; clauses: the clauses themselves.
        plain_ranks: with `explain`, the rank from 1 that each item has without the prompt, other things being equal.
    """

    items: list
    scores: list
    titles: list
    categories: list = field(default_factory=list)
    intents: list = field(default_factory=list)
    clauses: list = field(default_factory=list)
    plain_ranks: list = field(default_factory=list)

    @property
    def moves(self):
        """Places that each item rose (or fell, below 0) because of the prompt; with `explain`."""
        return [before - now for now, before in enumerate(self.plain_ranks, start=1)]


class Recommender:
    """Answers with a DPR model; needs neither the dataset nor RecBole's Config. Any number of threads may ask at once.

    Args:
        model: Promptable, in eval mode. items: V external ids, titles: V titles, categories: V lists of names.
        encoder: PromptEncoder, the one the model was trained with. max_length: items of a history that count.
        users: KnownUsers, or None. parse: text -> clauses, a router of `prompts.intent`.
        sentences: whether the router's clauses are whole sentences, in which the content has yet to be found.
    """

    def __init__(self, model, items, titles, categories, encoder, max_length, users=None, parse=parse_prompt, sentences=False):
        self.model, self.encoder, self.max_length = model.eval(), encoder, max_length
        self.items, self.titles, self.categories = list(items), list(titles), list(categories)
        self._users, self._tower, self._prompts = users, UserTower(model), PromptVectors(encoder, model.tagger, sentences)
        self._parse = lru_cache(_PROMPTS_KEPT)(lambda text: tuple(parse(text)))
        self._index = {item: row for row, item in enumerate(self.items, start=1)}
        with torch.no_grad():
            self._vectors = model.item_vectors()[1:].contiguous()  # [V, d]
        # the columns of plain scores, of prompted ones, and of what a clause adds to both: a product over fewer is quicker
        side = self._vectors.shape[1] - model.item_side.shape[1]
        self._plain, self._learned = self._vectors[:, : model.state_size].contiguous(), self._vectors[:, :side].contiguous()
        self._clauses = ClauseParts(model, self._prompts, self._vectors[:, side:])

    # --- what is known

    @property
    def users(self):
        """External ids of the users known by id; none where the folder has no users.safetensors."""
        return self._users.ids if self._users else []

    def history(self, user):
        """The external item ids of a known user, oldest first.

        Raises:
            UserError: the user is unknown, or the folder has no users.
        """
        if self._users is None:
            raise UserError(f"user={_shown(user)}: this model's folder has no {known_users.FILE} (runs of older versions have none); give a history instead")
        rows = self._users.rows(user)
        if rows is None:
            known = ", ".join(self.users[:3])
            raise UserError(f"unknown user {_shown(user)}: the model knows {len(self.users):,} users, such as {known}; for anyone else give a history")
        return [self.items[row - 1] for row in rows]

    def title(self, item):
        """The title of an external id; the id itself where there is none."""
        return self.titles[self._index[item] - 1] or item

    @cached_property
    def category_names(self):
        """All categories, the most frequent first."""
        return [name for name, _ in Counter(chain.from_iterable(self.categories)).most_common()]

    def clauses(self, prompt):
        """The clauses of a prompt in any of its forms: free text, a list of `Clause`, or None.

        Raises:
            UserError: it is something else.
        """
        if prompt is None or isinstance(prompt, str):
            if len(prompt or "") > MAX_PROMPT:
                warnings.warn(f"a prompt of {len(prompt):,} characters is cut after {MAX_PROMPT:,}", stacklevel=2)
            return list(self._parse((prompt or "")[:MAX_PROMPT]))
        if isinstance(prompt, (list, tuple)) and all(isinstance(clause, Clause) for clause in prompt):
            return list(prompt)
        raise UserError(f"prompt={_shown(prompt)}: a text, None or a list of Clause is needed")

    # --- vectors, for any vector store

    def prompt_vectors(self, texts, sentences=None):
        """float32 [N, D]: the sentence encoder's vectors of clauses, as the model takes them (docs/serving.md).

        Args:
            texts: N clauses. sentences: True for whole sentences, of which only what they describe counts; default as the router's clauses are.
        """
        return self._prompts(texts, sentences)

    @property
    def item_embeddings(self):
        """float32 [V, d], row order = `items`; score = dot product with `user_embedding`."""
        return self._vectors.cpu().numpy()

    def user_embedding(self, history=None, prompt=None, strength=1.0):
        """float32 [d]: the retrieval vector of a history and a prompt."""
        return self.user_embeddings([history], [prompt], [strength])[0]

    def user_embeddings(self, histories, prompts, strength=1.0):
        """float32 [B, d]; arguments as for `recommend_batch`."""
        requests = self._requests(histories, prompts, strength)
        return torch.cat([self._user_vectors(*part) for part in _parts(requests)] or [self._vectors[:0]]).cpu().numpy()

    # --- answers

    def recommend(self, history=None, prompt=None, k=10, exclude_seen=True, *, user=None, strength=1.0, **filters):
        """The k best items.

        Args:
            history: external item ids, oldest first; unknown ones are skipped with a warning, none at all is fine.
            prompt: free text, a list of `Clause`, or None.
            k: number of items, at least 1.
            exclude_seen: leave the history's items out.
            user: the id of a known user, instead of a history.
            strength: how much the prompt moves the list: 0 not at all, 1 as trained, or more; a list has one for each clause.
            filters: `allow`, `deny`, `categories` and `explain`, as for `recommend_batch`.

        Returns:
            Recommendations; fewer than k where fewer are left.

        Raises:
            UserError: an unknown user or category, or a value out of range.
        """
        if user is not None:
            if history is not None:
                raise UserError(f"user={_shown(user)} and a history: give one of them")
            history = self.history(user)
        return self.recommend_batch([history], [prompt], k, exclude_seen, strength=[strength], **filters)[0]

    def recommend_batch(
        self, histories, prompts, k=10, exclude_seen=True, *, strength=1.0, allow=None, deny=None, categories=None, explain=False
    ):
        """`recommend` for B requests at once.

        Args:
            histories: B lists; for known users `[rec.history(user) for user in …]`. prompts: B, which may be None.
            strength: a number for all, or B of what `recommend` takes.
            allow: the only ids to recommend; deny: ids not to; unknown ones are skipped with a warning.
            categories: recommend only items that have one of these.
            explain: also rank without the prompts, for `plain_ranks`.

        Returns:
            list of B Recommendations.
        """
        if not isinstance(k, int) or k < 1:
            raise UserError(f"k={k!r}: a whole number from 1 is needed")
        requests = self._requests(histories, prompts, strength)
        barred = self._barred(allow, deny, categories)
        return [answer for part in _parts(requests) for answer in self._answers(*part, k, exclude_seen, barred, explain)]

    @torch.inference_mode()
    def _answers(self, histories, clauses, strengths, k, exclude_seen, barred, explain):
        scores = self._scores(histories, clauses, strengths, exclude_seen, barred)  # [B, V]
        best, rows = scores.topk(min(k, len(self.items)), dim=1)
        ranks = torch.zeros_like(rows)
        if explain:
            plain = self._scores(histories, [()] * len(clauses), [()] * len(clauses), exclude_seen, barred)
            ranks = plain.argsort(dim=1, descending=True, stable=True).argsort(dim=1).gather(1, rows) + 1
        return [self._answer(*answer, explain) for answer in zip(best.tolist(), rows.tolist(), ranks.tolist(), clauses)]

    def _scores(self, histories, clauses, strengths, exclude_seen, barred):
        """[B, V]: `_user_vectors` times the items' vectors, of which a clause's part is added as it is kept."""
        flat, intent, strength, owner = self._flat(clauses, strengths)
        plain = not flat or self._tower.asks_plain(strength, owner, len(histories))
        state, answering = self._tower.states(*self._histories(histories), bool(flat), plain)
        if flat:
            attended, asked = self._clauses(flat, answering[owner])
            scores = self._tower.own_part(state, answering, attended, intent, strength, owner) @ self._learned.T
            scores.index_add_(0, owner, strength[:, None] * asked)
        else:
            scores = state @ self._plain.T
        if barred is not None:
            scores[:, barred] = -torch.inf
        if exclude_seen:
            for row, history in enumerate(histories):
                scores[row, np.array(history, dtype=np.int64) - 1] = -torch.inf
        return scores

    def _answer(self, scores, rows, ranks, clauses, explain):
        kept = [i for i, score in enumerate(scores) if score > -np.inf]
        rows = [rows[i] for i in kept]
        return Recommendations(
            items=[self.items[row] for row in rows],
            scores=[scores[i] for i in kept],
            titles=[self.titles[row] for row in rows],
            categories=[list(self.categories[row]) for row in rows],
            intents=[clause.intent for clause in clauses],
            clauses=list(clauses),
            plain_ranks=[ranks[i] for i in kept] if explain else [],
        )

    # --- requests: external -> rows, clauses, strengths

    def _requests(self, histories, prompts, strength):
        """(rows, clauses, strengths) of each request."""
        if len(histories) != len(prompts):
            raise UserError(f"{len(histories)} histories and {len(prompts)} prompts: one prompt (or None) for each history is needed")
        strength = list(strength) if isinstance(strength, (list, tuple, np.ndarray)) else [strength] * len(prompts)
        if len(strength) != len(prompts):
            raise UserError(f"{len(strength)} strengths and {len(prompts)} prompts: one number for all, or one for each prompt is needed")
        clauses = [self.clauses(prompt) for prompt in prompts]
        return [(self._rows(h, "history"), c, _strengths(s, c)) for h, c, s in zip(histories, clauses, strength)]

    def _rows(self, items, name):
        """Rows of the item table, from 1, of the known ones among external ids."""
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable | None):
            raise UserError(f"{name}={_shown(items)}: a list of item ids is needed, such as ['50', '172']")
        items = [str(item) for item in (() if items is None else items)]
        unknown_items = [item for item in items if item not in self._index]
        if unknown_items:
            shown = ", ".join(unknown_items[:5]) + (" …" if len(unknown_items) > 5 else "")
            warnings.warn(f"{len(unknown_items)} items of the {name} are unknown to the model and skipped: {shown}", stacklevel=2)
        return [self._index[item] for item in items if item in self._index]

    def _barred(self, allow, deny, categories):
        """bool [V], True for what the filters leave out; None without filters."""
        if allow is None and deny is None and categories is None:
            return None
        barred = torch.full((len(self.items),), allow is not None)
        if allow is not None:
            barred[np.array(self._rows(allow, "allow list"), dtype=np.int64) - 1] = False
        barred[np.array(self._rows(deny, "deny list"), dtype=np.int64) - 1] = True
        if categories is not None:
            wanted = {categories} if isinstance(categories, str) else set(categories)
            for name in wanted.difference(self.category_names):
                raise unknown("category", name, self.category_names)
            barred |= torch.tensor([wanted.isdisjoint(names) for names in self.categories])
        return barred.to(self._vectors.device)

    @torch.inference_mode()
    def _user_vectors(self, histories, clauses, strengths):
        """[B, d]."""
        flat, intent, strength, owner = self._flat(clauses, strengths)
        prompt, tokens = self._clauses.vectors([clause.text for clause in flat]) if flat else (None, None)
        return self._tower(*self._histories(histories), prompt, intent, strength, owner, tokens)

    def _histories(self, histories):
        """The items that count: int64 [B, T], padded with 0 on the right, and their numbers, int64 [B]."""
        recent = [history[-self.max_length :] for history in histories]
        item_seq = torch.zeros(len(recent), max([1, *map(len, recent)]), dtype=torch.int64)
        for row, history in enumerate(recent):
            item_seq[row, : len(history)] = torch.tensor(history, dtype=torch.int64)
        device = self._vectors.device
        return item_seq.to(device), torch.tensor([len(history) for history in recent]).to(device)

    def _flat(self, clauses, strengths):
        """The N clauses of all requests, their intents (an int where they agree), strengths [N] and requests int64 [N].

        Those of strength 0 are left out, so that without others an answer is the plain one to the last bit.
        """
        asked = [
            (clause, s, row) for row, parts in enumerate(zip(clauses, strengths)) for clause, s in zip(*parts) if s > 0
        ]
        flat, strength, owner = zip(*asked) if asked else ((), (), ())
        experts, device = [clause.expert for clause in flat], self._vectors.device
        intent = experts[0] if len(set(experts)) == 1 else torch.tensor(experts, dtype=torch.int64).to(device)
        return flat, intent, torch.tensor(strength, dtype=torch.float32).to(device), torch.tensor(owner, dtype=torch.int64).to(device)


def _parts(requests):
    """Requests, so many at a time that their scores fit into memory: (histories, clauses, strengths) of each part."""
    for start in range(0, len(requests), _AT_ONCE):
        yield tuple(zip(*requests[start : start + _AT_ONCE]))


def _strengths(strength, clauses):
    """One strength for each clause."""
    several = isinstance(strength, (list, tuple, np.ndarray))
    if several and len(strength) != len(clauses):
        raise UserError(f"strength={_shown(strength)}: the prompt has {len(clauses)} clauses; give one number, or one for each")
    values = list(strength) if several else [strength]
    for value in values:
        if not _is_weight(value):
            raise UserError(f"strength={_shown(value)}: a number from 0 is needed; 0 is no prompt, 1 as trained")
    return [float(value) for value in values] * (1 if several else len(clauses))


def _is_weight(value):
    """Whether a value is a finite number from 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < np.inf


def _shown(value):
    """A value in a message, in short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class _Settings(dict):
    """A Config's `[]`: a key that is not there is None."""

    def __missing__(self, key):
        return None


def save(folder, model, config, sequences, encoder):
    """Write model.safetensors and model.json, all that `load` needs, and the users that the model then knows by id."""
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    names = np.array(sequences.category_names, dtype=object)
    description = {
        "format": FORMAT,
        "model": type(model).__name__,
        "dataset": config["dataset"],
        "config": {k: v for k, v in config.final_config_dict.items() if isinstance(v, (int, float, str, bool, list, dict, type(None)))},
        "encoder": {"name": encoder.name, "precision": str(encoder.dtype).removeprefix("torch."), "size": encoder.dim},
        "items": sequences.item_tokens[1:].tolist(),
        "titles": sequences.titles[1:].tolist(),
        "categories": [names[row].tolist() for row in sequences.categories[1:]],
    }
    with replacing(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    known_users.save(folder, sequences)


def load(folder, device="cpu", prompt_encoder=None, intent_router=None, intent_model=None, unprompted_weight=None):
    """A Recommender from the folder of a finished run; unpickles nothing and needs no dataset.

    Args:
        folder: the run's folder, with model.safetensors and model.json.
        prompt_encoder: where the sentence encoder now lies, if not under the name it was trained with.
        intent_router, intent_model: what splits prompts into clauses (properties/dpr.yaml), if not what the run says.
        unprompted_weight: of the unprompted score in answers to prompts (properties/training.yaml), if not what the run says.
            At 0 prompted requests ask one backbone instead of two (docs/serving.md has what that gains and costs).

    Raises:
        UserError: a file is missing or damaged, the encoder or the router is not to be had, or the weight is none.
    """
    weight_is_given = unprompted_weight is not None
    if weight_is_given and not _is_weight(unprompted_weight):
        raise UserError(f"unprompted_weight={_shown(unprompted_weight)}: a number from 0 is needed")
    folder = Path(folder)
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        config = _Settings(description["config"])
        config["device"] = torch.device(device)
        if weight_is_given and config["decouple_backbone"] is False:
            raise UserError(f"unprompted_weight={unprompted_weight}: the model in {folder} has one backbone for all requests (decouple_backbone), and no such weight")
        if weight_is_given:
            config["unprompted_weight"] = unprompted_weight
        model = promptable(description["model"])(config, ItemVocabulary(len(description["items"]) + 1, config))
        model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    except FileNotFoundError as error:
        raise UserError(f"no model in {folder}: {Path(error.filename or 'model.safetensors').name} is missing; name the folder of a finished run") from None
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} is damaged or of another version ({type(error).__name__}: {str(error)[:120]})") from error
    trained_with = description["encoder"]
    encoder = PromptEncoder(prompt_encoder or trained_with["name"], trained_with["precision"], config["prompt_cache_dir"], device)
    if encoder.dim != trained_with["size"]:
        raise UserError(f"prompt_encoder={encoder.name!r} gives vectors of size {encoder.dim}, the model in {folder} needs {trained_with['size']}: {trained_with['name']}")
    intent_router = intent_router or config["intent_router"] or "tagger"
    parse = router(intent_router, intent_model or config["intent_model"] or NLI_MODEL)
    items, known = description["items"], known_users.read(folder, len(description["items"]) + 1)
    return Recommender(
        model, items, description["titles"], description["categories"], encoder, config["MAX_ITEM_LIST_LENGTH"], known, parse, intent_router not in SPLITTING
    )
