"""YAML as RecBole reads it, without its unsafe loader."""

import re

import yaml

from recbole_dpr.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3), as RecBole's loader does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_value(text):
    """A command line value as YAML, numbers such as 1e-3 included, as in RecBole's own YAML files."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path):
    """The mapping in a YAML file, by RecBole's loader."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config file '{path}': {error.strerror}; give existing files with --config_files=") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"config file '{path}': keys with values are needed, such as 'epochs: 5'")
    return settings
