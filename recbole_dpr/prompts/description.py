"""What a prompt describes, inside the sentence around it: "a heist story" in "not in the mood for a heist story".

The encoder's vector of a whole sentence is half about the sentence. So a small tagger reads the encoder's token vectors,
and the description that it finds is embedded on its own.

Legend: B texts of a batch, L tokens, D encoder size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from recbole_dpr.prompts.bank import NO_PROMPT
from recbole_dpr.prompts.cache import TextCache, digest, fitted_once, weights
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE

_HIDDEN, _DROPOUT = 96, 0.3
_EPOCHS, _BATCH, _LEARNING_RATE = 4, 64, 3e-3
_READ_AT_ONCE = 4096  # texts whose token vectors are in memory together; what an interruption can lose
# examples of each kind: sentences around tags, by intent; around each category, by intent; and whole texts
_TAGS, _CATEGORIES, _WISHES, _BARE = (2500, 1500), 60, 2500, 500
_CHATTER = 0.3  # share of them with small talk before, and with some behind


class DescriptionTagger(nn.Module):
    """Which tokens of a prompt are part of its description: a bidirectional GRU over frozen token vectors."""

    def __init__(self, size):
        super().__init__()
        self.input = nn.Sequential(nn.LayerNorm(size), nn.Dropout(_DROPOUT), nn.Linear(size, _HIDDEN), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.gru = nn.GRU(_HIDDEN, _HIDDEN, batch_first=True, bidirectional=True)
        self.output = nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(2 * _HIDDEN, 1))
        self.requires_grad_(False)  # it is fitted before the model trains, and left as it is

    def forward(self, tokens, lengths):
        """float [B, L, D] padded, int64 [B] on the CPU -> log-odds [B, L]."""
        packed = nn.utils.rnn.pack_padded_sequence(self.input(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.output(states).squeeze(-1)


@dataclass(frozen=True)
class Example:
    """A text whose characters from `start` to `end` are its description."""

    text: str
    start: int
    end: int


def examples(bank, rng):
    """Training sentences around training tags and categories, and texts that are descriptions as a whole; some amid small talk.

    Where there are no tags, the items' own descriptions take their place.

    Args:
        bank: PromptBank; rng: numpy Generator.
    """
    texts = np.array(bank.all_texts, dtype=object)
    tags, wishes = (np.unique(rows[rows != NO_PROMPT]) for rows in (bank.tag[POSITIVE][..., 0], bank.wish))
    if not len(tags):
        tags = np.unique(bank.about[bank.about != NO_PROMPT])
    found = []
    for intent, n_tags in zip((POSITIVE, NEGATIVE), _TAGS):
        forms = np.array(bank.templates.tagger_carriers(intent), dtype=object)
        for tag in texts[_some(tags, n_tags, rng)]:
            found.append(_in_sentence(rng.choice(forms), tag[:1].lower() + tag[1:].rstrip(".")))
        for name, rows in zip(bank.category_names, bank.category[intent]):
            for text in texts[_some(rows, _CATEGORIES, rng)]:
                start = text.lower().index(name.lower())
                found.append(Example(text, start, start + len(name)))
    whole = texts[np.concatenate([_some(wishes, _WISHES, rng), _some(tags, _BARE, rng)])]
    found += [Example(text, 0, len(text)) for text in whole]
    before, after = (["", *bank.templates.chatter[place]] for place in ("before", "after"))
    drawn = zip(*(rng.integers(len(some), size=len(found)) * (rng.random(len(found)) < _CHATTER) for some in (before, after)))
    return [_with_chatter(example, before[i], after[j]) for example, (i, j) in zip(found, drawn)]


def _with_chatter(example, before, after):
    before = before and f"{before} "
    text = before + example.text + (after and f" {after}")
    return Example(text, len(before) + example.start, len(before) + example.end)


def _some(rows, n, rng):
    return rng.permutation(rows)[:n]


def _in_sentence(form, tag):
    start = form.index("{tag}")
    return Example(form.replace("{tag}", tag), start, start + len(tag))


def fitted(encoder, samples, seed, show_progress=False):
    """A tagger trained on examples; the one of the same encoder, examples and seed comes from the cache.

    Args:
        encoder: PromptEncoder; samples: list of Example; seed: int.

    Returns:
        DescriptionTagger in eval mode, on the encoder's device.
    """
    def fit(tagger):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in (tagger.input[2], tagger.gru, tagger.output[1]):
                module.reset_parameters()
            _train(tagger, encoder, samples, np.random.default_rng(seed), show_progress)

    recipe = repr((seed, _EPOCHS, _BATCH, _LEARNING_RATE, samples)).encode()
    return fitted_once(encoder.cache.folder, f"taggers-{encoder.fingerprint}", recipe, DescriptionTagger(encoder.dim).to(encoder.device), fit)


def _train(tagger, encoder, samples, rng, show_progress):
    texts = [sample.text for sample in samples]
    tokens, offsets = encoder.encode_tokens(texts, show_progress)
    places = encoder.token_places(texts)
    lengths = np.diff(offsets)
    start, end = (np.repeat([getattr(sample, name) for sample in samples], lengths) for name in ("start", "end"))
    inside = torch.from_numpy((places[:, 0] >= start) & (places[:, 1] <= end)).float()
    counts = torch.from_numpy(places[:, 1] > places[:, 0])
    tokens = torch.from_numpy(tokens)
    optimizer = torch.optim.AdamW(tagger.requires_grad_(True).parameters(), lr=_LEARNING_RATE)
    n_batches = -(-len(samples) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, _EPOCHS * n_batches)
    tagger.train()
    with tqdm(total=_EPOCHS * n_batches, desc="learn to find descriptions", disable=not show_progress) as bar:
        for _ in range(_EPOCHS):
            # like lengths side by side, with a little noise so that each epoch has other neighbours
            order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)))
            for batch in rng.permutation(n_batches):
                rows = order[batch * _BATCH : (batch + 1) * _BATCH]
                padded = [_padded(part, offsets, rows).to(encoder.device) for part in (tokens, inside, counts)]
                odds = tagger(padded[0].float(), torch.from_numpy(lengths[rows]))
                loss = nn.functional.binary_cross_entropy_with_logits(odds[padded[2]], padded[1][padded[2]])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()
    tagger.requires_grad_(False)


def _padded(flat, offsets, rows):
    return nn.utils.rnn.pad_sequence([flat[offsets[row] : offsets[row + 1]] for row in rows], batch_first=True)


def read(tagger, encoder, texts, show_progress=False, cached=True):
    """The description in each text: the stretch of tokens with the largest sum of log-odds; the text itself if it has none.

    Args:
        tagger: DescriptionTagger; encoder: the PromptEncoder that it was fitted with.
        cached: False neither reads nor writes the disk: requests of users are not kept.

    Returns:
        list of str.
    """
    texts = list(texts)
    unique = list(dict.fromkeys(texts))
    cache = TextCache(encoder.cache.folder, f"described-{encoder.fingerprint}-{digest(weights(tagger))}") if cached else None
    found = {text: description.decode() for text, description in cache.get(unique).items()} if cached else {}
    missing = sorted((text for text in unique if text not in found), key=len)
    for start in range(0, len(missing), _READ_AT_ONCE):
        chunk = missing[start : start + _READ_AT_ONCE]
        described = _read(tagger, encoder, chunk, show_progress, cached)
        if cached:
            cache.put(chunk, [description.encode() for description in described])
        found.update(zip(chunk, described))
    return [found[text] for text in texts]


@torch.no_grad()
def _read(tagger, encoder, texts, show_progress, cached):
    stripped = [text.strip() for text in texts]  # as sentence-transformers does
    tokens, offsets = encoder.encode_tokens(stripped, show_progress, cached)
    places, tokens, lengths = encoder.token_places(stripped), torch.from_numpy(tokens), np.diff(offsets)
    result = []
    for first in range(0, len(texts), _BATCH):
        rows = np.arange(first, min(first + _BATCH, len(texts)))
        odds = tagger(_padded(tokens, offsets, rows).float().to(encoder.device), torch.from_numpy(lengths[rows]))
        for row, row_odds in zip(rows, odds.cpu().numpy()):
            place = places[offsets[row] : offsets[row + 1]]
            real = place[:, 1] > place[:, 0]
            best = _best_stretch(row_odds[: len(place)][real])
            if best is None:
                result.append(stripped[row])
            else:
                result.append(stripped[row][place[real][best[0], 0] : place[real][best[1], 1]])
    return result


def _best_stretch(odds):
    """First and last index of the stretch with the largest sum; None where no sum is positive."""
    if not (odds > 0).any():
        return None
    sums = np.concatenate([[0.0], np.cumsum(odds, dtype=np.float64)])
    lowest = np.minimum.accumulate(sums[:-1])  # before each end, where to start best
    last = int(np.argmax(sums[1:] - lowest))
    return int(np.argmin(sums[: last + 1])), last
