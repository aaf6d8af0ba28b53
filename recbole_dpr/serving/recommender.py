"""A trained model that answers: histories and prompts in, ranked items out.

Legend: B requests, V items without padding, d size of the retrieval vectors.
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recbole_dpr.errors import UserError
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.prompts import description
from recbole_dpr.prompts.encoder import PromptEncoder
from recbole_dpr.prompts.intent import parse_prompt
from recbole_dpr.train.checkpoints import replacing

FORMAT = 1  # of model.json


@dataclass(frozen=True)
class Recommendations:
    """What was recommended, best first.

    Attributes:
        items: external ids; titles: theirs ("" where the dataset has none); scores: floats.
        intents: "positive" / "negative" of each clause of the prompt; clauses: the clauses themselves.
    """

    items: list
    scores: list
    titles: list
    intents: list = field(default_factory=list)
    clauses: list = field(default_factory=list)


class Recommender:
    """Answers with a DPR model; needs neither the dataset nor RecBole's Config.

    Args:
        model: Promptable, in eval mode. items: V external ids, titles: V titles, categories: V lists of names.
        encoder: PromptEncoder, the one the model was trained with. max_length: items of a history that count.
    """

    def __init__(self, model, items, titles, categories, encoder, max_length):
        self.model, self.encoder, self.max_length = model.eval(), encoder, max_length
        self.items, self.titles, self.categories = list(items), list(titles), list(categories)
        self._index = {item: row for row, item in enumerate(self.items, start=1)}
        with torch.no_grad():
            self._vectors = model.item_vectors()[1:].contiguous()  # [V, d]

    @property
    def item_embeddings(self):
        """float32 [V, d], row order = `items`; score = dot product with `user_embedding`."""
        return self._vectors.cpu().numpy()

    def user_embedding(self, history, prompt=None):
        """float32 [d]: the retrieval vector of a history and a prompt."""
        return self._user_vectors([self._known(history)], [parse_prompt(prompt or "")])[0].cpu().numpy()

    def recommend(self, history, prompt=None, k=10, exclude_seen=True):
        """The k best items.

        Args:
            history: external item ids, oldest first; unknown ones are skipped with a warning, none at all is fine.
            prompt: free text, or None.
            k: number of items, at least 1.
            exclude_seen: leave the history's items out.

        Returns:
            Recommendations.
        """
        return self.recommend_batch([history], [prompt], k, exclude_seen)[0]

    def recommend_batch(self, histories, prompts, k=10, exclude_seen=True):
        """`recommend` for B requests at once; `prompts` may hold None. Returns a list of Recommendations."""
        if not isinstance(k, int) or k < 1:
            raise UserError(f"k={k!r}: a whole number from 1 is needed")
        if len(histories) != len(prompts):
            raise UserError(f"{len(histories)} histories and {len(prompts)} prompts: one prompt (or None) for each history is needed")
        known = [self._known(history) for history in histories]
        clauses = [parse_prompt(prompt or "") for prompt in prompts]
        scores = self._user_vectors(known, clauses) @ self._vectors.T  # [B, V]
        if exclude_seen:
            for row, history in enumerate(known):
                scores[row, np.array(history, dtype=np.int64) - 1] = -torch.inf
        best, rows = scores.topk(min(k, len(self.items)), dim=1)
        return [self._answer(*answer) for answer in zip(best.tolist(), rows.tolist(), clauses)]

    def _answer(self, scores, rows, clauses):
        kept = [(row, score) for row, score in zip(rows, scores) if score > -np.inf]
        return Recommendations(
            items=[self.items[row] for row, _ in kept],
            scores=[score for _, score in kept],
            titles=[self.titles[row] for row, _ in kept],
            intents=[clause.intent for clause in clauses],
            clauses=list(clauses),
        )

    def _known(self, history):
        if isinstance(history, (str, bytes)):
            raise UserError(f"history={history!r}: a list of item ids is needed, such as ['50', '172']")
        history = [str(item) for item in history]
        unknown = [item for item in history if item not in self._index]
        if unknown:
            shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
            warnings.warn(f"{len(unknown)} items of the history are unknown to the model and skipped: {shown}", stacklevel=4)
        return [self._index[item] for item in history if item in self._index]

    @torch.no_grad()
    def _user_vectors(self, histories, clauses):
        """[B, d] for known histories and parsed prompts.

        The clauses of a prompt each move the state through their expert, and the moves add up.
        """
        device = self._vectors.device
        recent = [history[-self.max_length :] for history in histories]
        lengths = torch.tensor([max(1, len(h)) for h in recent])
        item_seq = torch.zeros(len(recent), int(lengths.max()), dtype=torch.int64)
        for row, history in enumerate(recent):
            item_seq[row, : len(history)] = torch.tensor(history, dtype=torch.int64)
        item_seq, lengths = item_seq.to(device), lengths.to(device)
        empty = torch.tensor([not h for h in recent], device=device)[:, None]
        mean, backbones = self.model.mean_states, (self.model, self.model.answering)
        state = torch.where(empty, mean[0], backbones[0].encode(item_seq, lengths))
        vectors = self.model.unprompted_vectors(state)
        owner = [row for row, parts in enumerate(clauses) for _ in parts]
        if not owner:
            return vectors
        answering = torch.where(empty, mean[1], backbones[1].encode(item_seq, lengths))
        flat = [clause for parts in clauses for clause in parts]
        owner, intent = torch.tensor(owner, device=device), torch.tensor([c.expert for c in flat], device=device)
        texts = [c.text for c in flat]
        if self.model.tagger is not None:
            texts = description.read(self.model.tagger, self.encoder, texts, cached=False)
        prompt = torch.from_numpy(self.encoder.encode(texts, cached=False)).to(device)
        prompted = self.model.prompted_vectors(state[owner], answering[owner], prompt, intent, self._tokens(texts, device))
        resting = self.model.resting_vectors(state, answering)
        moved = resting.index_add(0, owner, prompted - resting[owner])
        asked = torch.zeros(len(state), dtype=torch.bool, device=device).index_fill(0, owner, True)
        return torch.where(asked[:, None], moved, vectors)

    def _tokens(self, texts, device):
        if not self.model.token_keys:
            return None
        flat, offsets = self.encoder.encode_tokens(texts, cached=False)
        parts = [torch.from_numpy(flat[a:b]).float() for a, b in zip(offsets, offsets[1:])]
        tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        padding = torch.arange(tokens.shape[1]) >= torch.tensor([len(p) for p in parts])[:, None]
        return tokens.to(device), padding.to(device)


class _Settings(dict):
    """A Config's `[]`: a key that is not there is None."""

    def __missing__(self, key):
        return None


def save(folder, model, config, sequences, encoder):
    """Write model.safetensors and model.json: all that `load` needs."""
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


def load(folder, device="cpu", prompt_encoder=None):
    """A Recommender from the folder of a finished run; unpickles nothing and needs no dataset.

    Args:
        folder: the run's folder, with model.safetensors and model.json.
        prompt_encoder: where the sentence encoder now lies, if not under the name it was trained with.

    Raises:
        UserError: a file is missing or damaged, or the encoder is not to be had.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        config = _Settings(description["config"])
        config["device"] = torch.device(device)
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
    return Recommender(model, description["items"], description["titles"], description["categories"], encoder, config["MAX_ITEM_LIST_LENGTH"])
