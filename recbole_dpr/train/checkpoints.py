"""Checkpoints that are written whole or not at all, and read without unpickling anything."""

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from recbole_dpr import distributed
from recbole_dpr.errors import UserError


@contextmanager
def replacing(path):
    """A path to write to; it takes the place of `path` when the block ends well, else it is removed.

    Of several processes the first alone writes, and the others wait for it.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    if distributed.is_first():
        with replacing_here(path) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
    distributed.barrier()


@contextmanager
def replacing_here(path, key="output_dir"):
    """As `replacing`, for a file that is this process's own matter; key: the setting that names its folder."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name a writable folder with --{key}=") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def save(path, state):
    """Write a dict of tensors, numbers, strings, lists and dicts."""
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
            raise OSError(None, str(error).split("\n")[0]) from error


def load(path, device="cpu"):
    """Read what `save` wrote.

    Raises:
        UserError: the file is missing, truncated, or no checkpoint of ours.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; name the folder of a run with --resume= or --stage1_checkpoint=") from None
    except Exception as error:  # a damaged zip or pickle raises anything
        raise UserError(
            f"checkpoint {path} is damaged or none of RecBole-DPR's ({type(error).__name__}); delete it to train this stage anew"
        ) from error


def identity(config, item_tokens):
    """What a checkpoint has to share with the run that reads it: backbone sizes aside, the items and their order."""
    digest = hashlib.sha256("\n".join(item_tokens).encode()).hexdigest()[:16]
    return {"dataset": config["dataset"], "items": digest}


def check_identity(state, own, path):
    """Raise UserError if a checkpoint belongs to other data."""
    theirs = state.get("identity")
    if theirs != own:
        other = (theirs or {}).get("dataset", "unknown data")
        raise UserError(
            f"checkpoint {path} is of dataset '{other}' or of other filter settings, this run is of '{own['dataset']}'; "
            "name a run on the same data, or train anew in another --output_dir="
        )
