"""A larger tagger that the shipped one learns from (benchmarks/train_router.py): all-mpnet-base-v2 under the same head.

Its words are those of the shipped tagger: both encoders cut text into words as BERT does, uncased.
"""

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel

from recbole_dpr.errors import UserError
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.clause_tagger import ClauseTagger, Reader

_FROZEN = 4  # of its 12 layers, with the embeddings
_LEARNING_RATE = 6e-5


class Teacher(ClauseTagger):
    """Scores of label sequences over words; args: folder of a sentence-transformers model of MPNet."""

    def __init__(self, folder):
        nn.Module.__init__(self)
        self.body = AutoModel.from_pretrained(folder, attn_implementation="eager")
        self._add_head(self.body.config.hidden_size)

    def states(self, pieces, mask):
        pieces = torch.where(mask, pieces, self.body.config.pad_token_id)
        return self.body(input_ids=pieces, attention_mask=mask.long()).last_hidden_state


class TeacherReader(Reader):
    """A Reader whose special tokens are MPNet's."""

    def __init__(self, tokenizer, tagger):
        super().__init__(tokenizer, tagger)
        self._cls, self._sep = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))


def untrained(folder):
    """A TeacherReader over the encoder in a folder."""
    return TeacherReader(Tokenizer.from_file(f"{folder}/tokenizer.json"), Teacher(folder))


def trained_parts(tagger):
    """(layers, those whose output meets dropout, learning rate) of a Teacher, as a `train_router.Plan` has them."""
    layers = list(tagger.body.encoder.layer[_FROZEN:])
    return layers, [part for layer in layers for part in (layer.attention.attn.o, layer.output.dense)], _LEARNING_RATE


def load(folder, file, made_of):
    """The TeacherReader over the encoder in a folder, as it was trained.

    Raises:
        UserError: the file is of other texts or settings than the metadata `made_of` says, or of another encoder.
    """
    with safe_open(file, "pt") as opened:
        if opened.metadata() != made_of:
            raise UserError(f"teacher={file}: made of other texts, or with another seed or number of epochs; name a new file to make one")
        trained = {name: opened.get_tensor(name).float() for name in opened.keys()}
    reader = untrained(folder)
    missing, unexpected = reader.tagger.load_state_dict(trained, strict=False)
    if unexpected or {"output.weight", "transitions"} & set(missing):
        raise UserError(f"teacher={file}: of another encoder than the one in {folder}")
    reader.tagger.to(compute_dtype("auto", torch.device("cpu")))
    return reader
