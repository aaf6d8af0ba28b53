"""Config -> all that a run knows before it trains: sequences, prompts and evaluation sets."""

import logging
import zipfile
from dataclasses import dataclass, replace
from urllib.error import URLError

import numpy as np
import torch

from recbole_dpr.data.cache import cached
from recbole_dpr.data.dataset import TEST, VALID, FlatDataset, Sequences, build_sequences, check_files
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation.evaluator import with_prompts
from recbole_dpr.evaluation.queries import PROMPT_KINDS, build_queries
from recbole_dpr.prompts import description
from recbole_dpr.prompts.bank import PromptBank
from recbole_dpr.prompts.encoder import PromptEncoder
from recbole_dpr.prompts.item_text import LikelihoodText
from recbole_dpr.prompts.meaning import MeaningReader
from recbole_dpr.prompts.tags import load_item_texts
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE, Templates

_TEMPLATE_STREAM, _TAGGER_STREAM = 7, 8  # random streams of the bank and the tagger, apart from those of the evaluation set

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Materials:
    """What every method of a run shares.

    Attributes:
        sequences: Sequences.
        bank: PromptBank, embedded by `prepare_prompts` (and left as texts by `prepare_queries`).
        valid, test: lists of PromptedQueries.
        tagger: DescriptionTagger, or None where prompts are taken as they are.
        meaning_reader: MeaningReader, or None without `item_text`.
    """

    sequences: Sequences
    bank: PromptBank
    valid: list
    test: list
    tagger: description.DescriptionTagger | None = None
    meaning_reader: MeaningReader | None = None


def read_sequences(config):
    """Read, filter and split the dataset that the config names, or find it done: Sequences.

    Raises:
        UserError: files, fields or categories are missing, or nothing is left to evaluate.
    """
    return cached(config, lambda: build_sequences(read_dataset(config)))


def read_dataset(config, dataset_class=FlatDataset):
    """The dataset that the config names as RecBole has it, read and filtered.

    Raises:
        UserError: files or fields are missing, or the filters leave nothing.
    """
    check_files(config)
    try:
        return dataset_class(config)
    except (URLError, zipfile.BadZipFile, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"dataset '{config['dataset']}': download failed ({error}); put its atomic files into a folder "
            f"{config['dataset']}/ and name the folder above it with --data_path="
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"dataset '{config['dataset']}' in {config['data_path']}: {error}") from error


def prepare_queries(config, sequences):
    """The evaluation sets with their prompts as text: all that a method needs which ignores the prompts."""
    texts = load_item_texts(config["item_texts"], sequences.item_tokens, sequences.titles, sequences.years, config["ITEM_TEXT_ID"])
    rng = np.random.default_rng([config["seed"], _TEMPLATE_STREAM])
    bank = PromptBank(Templates(config["prompt_templates"]), texts, sequences.category_names, item_descriptions(sequences), rng, not config["read_prompts"])
    test = with_prompts(build_queries(sequences, config, TEST), bank, TEST, PROMPT_KINDS, config["eval_tag_form"])
    valid_sets = build_queries(sequences, config, VALID, [config["valid_window"]])
    valid = with_prompts(valid_sets, bank, VALID, PROMPT_KINDS, config["eval_tag_form"])
    return Materials(sequences, bank, valid, test)


def prepare_prompts(config, sequences, show_progress):
    """The prompt bank, embedded, and the evaluation sets with their prompts; and the encoder."""
    materials = prepare_queries(config, sequences)
    encoder = PromptEncoder(config["prompt_encoder"], config["encoder_precision"], config["prompt_cache_dir"], config["device"])
    bank, tagger, read, meaning_reader = materials.bank, None, None, None
    if config["read_prompts"]:
        rng = np.random.default_rng([config["seed"], _TAGGER_STREAM])
        tagger = description.fitted(encoder, description.examples(bank, rng), config["seed"], show_progress)
        read = lambda texts: description.read(tagger, encoder, texts, show_progress)  # noqa: E731
    bank.embed(encoder, show_progress, read, config["prompt_keys"] == "token")
    if config["item_text"]:
        meaning_reader = bank.meaning_reader(torch.from_numpy(sequences.categories), config["seed"], encoder.cache.folder, show_progress)
    return replace(materials, tagger=tagger, meaning_reader=meaning_reader), encoder


def attach(model, materials):
    """Give a DPR model its item side, if it has one, and its prompt table, from embedded materials."""
    bank, device = materials.bank, model.item_embedding.weight.device
    if model.item_weights is not None:
        categories = torch.from_numpy(materials.sequences.categories)
        readers = [bank.category_reader(intent) for intent in (POSITIVE, NEGATIVE)]
        model.attach_items(LikelihoodText(bank, device), categories, readers, materials.meaning_reader)
    model.attach_prompts(bank.asked, bank.tokens, materials.tagger)


def item_descriptions(sequences):
    """V texts, what an item is about: "title: category, category", as far as known; "" for the padding."""
    names = np.array(sequences.category_names, dtype=object)
    categories = [", ".join(names[row]).lower() for row in sequences.categories]
    return [": ".join(part for part in parts if part) for parts in zip(sequences.titles, categories)]
