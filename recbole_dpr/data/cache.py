"""Sequences on disk, found by the content of all that they were made of."""

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
from recbole.utils import argument_list

from recbole_dpr import distributed
from recbole_dpr.data import dataset
from recbole_dpr.data.dataset import Sequences
from recbole_dpr.train.checkpoints import replacing_here

# what reading depends on; the maximum length cuts histories, which comes later
_SETTINGS = sorted(
    {*argument_list.dataset_arguments, "eval_args", "encoding", "drop_unseen_items", "CATEGORY_FIELD", "CATEGORY_IGNORE", "TITLE_FIELD", "YEAR_FIELD"}
    - {"MAX_ITEM_LIST_LENGTH"}
)
_ARRAYS = ("items", "offsets", "train_end", "valid_end", "categories", "item_tokens", "user_tokens")
_TEXTS = ("category_names", "titles", "years")  # lists of strings, as JSON: NumPy would pickle them

logger = logging.getLogger(__name__)


def cached(config, build):
    """What `build()` gives, or what it gave in an earlier run on the same files, by the same settings and code.

    Args:
        config: recbole Config; `data_cache_dir` is the folder, None for ~/.cache/recbole_dpr/data, False for no cache.
        build: function without arguments -> Sequences.

    Raises:
        UserError: the folder cannot be written.
    """
    files = sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*"))
    if config["data_cache_dir"] is False or not files:  # without files RecBole downloads them: the next run knows them
        return build()
    folder = Path(config["data_cache_dir"] or "~/.cache/recbole_dpr/data").expanduser()
    path = folder / f"{config['dataset']}-{_digest(config, files)}.npz"
    with distributed.first_goes_first():
        if path.exists():
            try:
                return _read(path)
            except Exception as error:  # a damaged zip raises anything
                logger.warning("data cache %s is damaged (%s) and made anew", path, type(error).__name__)
        sequences = build()
        with replacing_here(path, "data_cache_dir") as temporary:
            _write(temporary, sequences)
        return sequences


def _digest(config, files):
    """Of the files' content, the settings, our code and the packages that read."""
    digest = hashlib.sha256()
    packages = {name: version(name) for name in ("recbole", "pandas", "numpy")}
    settings = {key: config[key] for key in _SETTINGS}
    digest.update(json.dumps([packages, settings, [file.name for file in files]], sort_keys=True, default=str).encode())
    for file in (Path(__file__), Path(dataset.__file__), *files):
        content = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()[:32]


def _write(path, sequences):
    texts = {name: list(getattr(sequences, name)) for name in _TEXTS}
    arrays = {name: getattr(sequences, name) for name in _ARRAYS}
    with open(path, "wb") as file:
        np.savez(file, texts=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8), **arrays)


def _read(path):
    with open(path, "rb") as stream, np.load(stream) as file:  # unpickles nothing, and holds every array against its checksum
        texts = json.loads(file["texts"].tobytes())
        arrays = {name: file[name] for name in _ARRAYS}
    titles, years = (np.array(texts[name], dtype=object) for name in ("titles", "years"))
    return Sequences(**arrays, category_names=tuple(texts["category_names"]), titles=titles, years=years)
