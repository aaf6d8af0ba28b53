"""Vectors of the prompts that people typed: the latest in memory, never on disk."""

from threading import Lock

import numpy as np
import torch

from recbole_dpr.prompts import description
from recbole_dpr.serving.memory import Memory

_KEPT = 10_000  # texts; 15 MB with vectors of size 384


class PromptVectors:
    """A sentence encoder for many threads, with a memory.

    Hugging Face's tokenizers may refuse two callers at once ("Already borrowed", where their settings change), so texts
    are encoded one call after the other; known ones wait for nobody.

    Args:
        encoder: PromptEncoder.
        tagger: DescriptionTagger that finds what a sentence describes; None takes sentences as they are.
        sentences: whether texts are whole sentences, where nothing else is said; else they are clauses, the content alone.
    """

    def __init__(self, encoder, tagger=None, sentences=False):
        self.encoder, self.tagger, self.sentences = encoder, tagger, sentences
        self._known, self._encoding = Memory(_KEPT), Lock()

    def __call__(self, texts, sentences=None):
        """float32 [n, D]."""
        sentences = self.sentences if sentences is None else sentences
        keys = [(_encodable(text), sentences) for text in texts]
        found = self._known.found(keys)
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            with self._encoding:
                found.update(zip(missing, self.encoder.encode(self._content([text for text, _ in missing], sentences), cached=False)))
        self._known.keep(found)
        return np.stack([found[key] for key in keys])

    def tokens(self, texts):
        """Token vectors float [n, L, D], and bool [n, L], True where there is none."""
        with self._encoding:
            flat, offsets = self.encoder.encode_tokens(self._content([_encodable(text) for text in texts], self.sentences), cached=False)
        parts = [torch.from_numpy(flat[a:b]).float() for a, b in zip(offsets, offsets[1:])]
        tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return tokens, torch.arange(tokens.shape[1]) >= torch.tensor([len(part) for part in parts])[:, None]

    def _content(self, texts, sentences):
        return description.read(self.tagger, self.encoder, texts, cached=False) if sentences and self.tagger else texts


def _encodable(text):
    """Half a surrogate pair, which JSON can bring, is text to Python and to nobody else."""
    return text.encode("utf-8", "replace").decode("utf-8")
