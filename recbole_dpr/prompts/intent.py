"""Prompt text -> clauses with intents, by one of three routers (docs/router.md compares them). English.

`tagger`: the default sentence encoder, fine-tuned to find clauses. `nli`: the paper's zero-shot classifier of whole
prompts. `cues`: negation words, without a model.
"""

import re
from dataclasses import dataclass
from threading import Lock

from recbole_dpr.errors import unknown
from recbole_dpr.prompts.templates import INTENTS, NEGATIVE, POSITIVE

NLI_MODEL = "facebook/bart-large-mnli"  # the paper's


@dataclass(frozen=True)
class Clause:
    """A stretch of a prompt that asks for one thing.

    Attributes:
        text: what is asked for or to be avoided.
        intent: "positive" or "negative".
    """

    text: str
    intent: str

    @property
    def expert(self):
        """POSITIVE or NEGATIVE: which expert of the tower answers it."""
        return NEGATIVE if self.intent == INTENTS[NEGATIVE] else POSITIVE


def parse_prompt(text):
    """Split a prompt into clauses with intents, by the tagger. It reads English; other languages come out by chance.

    >>> [(c.text, c.intent) for c in parse_prompt("a comedy, but no romance")]
    [('a comedy', 'positive'), ('romance', 'negative')]

    Returns:
        list of Clause, in the order of the text; empty for a text without any character.
    """
    return router("tagger")(text)


def router(name, model=NLI_MODEL):
    """A function as `parse_prompt`, loaded once per process; any number of threads may call it at once.

    Args:
        name: of `ROUTERS`; model: for `nli`, the folder or hub name of a model trained on natural language inference.

    Raises:
        UserError: an unknown name, or the model is not to be had.
    """
    if name not in ROUTERS:
        raise unknown("intent_router=", name, list(ROUTERS))
    with _LOADING:
        key = (name, model if name == "nli" else None)
        if key not in _LOADED:
            _LOADED[key] = ROUTERS[name](model)
        split = _LOADED[key]

    def parse(text):
        # half a surrogate pair, which JSON can bring, is text to Python and to no tokenizer
        text = " ".join(str(text).encode("utf-8", "replace").decode("utf-8").split())
        if not re.search(r"\w", text):
            return [Clause(text, INTENTS[POSITIVE])] if text else []
        return split(text)

    return parse


def _tagger(model):
    from recbole_dpr.prompts import clause_tagger

    return clause_tagger.load()


def _nli(model):
    from recbole_dpr.prompts.nli import ZeroShot

    return ZeroShot(model)


def _cues(model):
    from recbole_dpr.prompts import cues

    return cues.split


ROUTERS = {"tagger": _tagger, "nli": _nli, "cues": _cues}
SPLITTING = ("tagger",)  # whose clauses are the content alone; those of the others have the sentence around it
_LOADED, _LOADING = {}, Lock()
