"""Where the files that come with the package are: property files and semantic tags."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def properties_dir() -> Path:
    """The folder of YAML property files."""
    return _folder("properties")


def dataset_dir() -> Path:
    """The folder of the data that we wrote, such as `movielens/tags.tsv`."""
    return _folder("dataset")


def _folder(name: str) -> Path:
    """The installed copy beside the package, else the folder on top of the source tree."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
