"""The paper's router: a whole prompt is positive or negative, by zero-shot natural language inference."""

from threading import Lock

from recbole_dpr.errors import UserError
from recbole_dpr.prompts.intent import Clause
from recbole_dpr.prompts.templates import INTENTS

_HYPOTHESIS = "This text expresses a {}."
_LABELS = {f"{intent} preference": intent for intent in INTENTS}


class ZeroShot:
    """Texts -> one clause each.

    Args:
        model: folder or hub name of a model trained on natural language inference.

    Raises:
        UserError: the model is not to be had.
    """

    def __init__(self, model):
        from transformers import pipeline

        try:
            self._classify = pipeline("zero-shot-classification", model=str(model), device="cpu")
        except Exception as error:  # whatever the hub client, the file system or the model's own code raises
            raise UserError(
                f"intent_model={str(model)!r} is not to be had ({type(error).__name__}: {str(error).split(chr(10))[0][:120]}); give the "
                "folder of a model for natural language inference, a hub name with network, or --intent_router=tagger"
            ) from error
        self._classifying = Lock()  # Hugging Face's tokenizers may refuse two callers at once

    def __call__(self, text):
        """[Clause]: the text as it stands, with its intent."""
        with self._classifying:
            found = self._classify(text, list(_LABELS), hypothesis_template=_HYPOTHESIS)
        return [Clause(text, _LABELS[found["labels"][0]])]
