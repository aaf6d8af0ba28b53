"""A params file -> the search space: key -> one distribution, {"choice": [...]}, {"uniform": [a, b]} or {"loguniform": [a, b]}.

Two formats. A name that ends in .yaml or .yml is YAML, whose numbers are the values themselves:

    learning_rate: {loguniform: [1e-4, 1e-2]}
    hidden_size: {choice: [64, 128]}

Any other file is in RecBole's format (recbole.trainer.hyper_tuning), whose loguniform takes exponents of e:

    learning_rate loguniform -8,0
    hidden_size choice [64,128]
"""

import ast
import json
import math
from pathlib import Path

from recbole_dpr.config import make_config, searchable_keys
from recbole_dpr.errors import UserError, unknown
from recbole_dpr.yamlfile import read_yaml

_SIZES = {"choice": None, "uniform": 2, "quniform": 3, "loguniform": 2}  # name -> how many numbers it takes
_DIGITS = 12  # of the multiples of q: 3 * 0.1 is to be 0.3


def read_space(path):
    """The search space in a params file. Nothing in it is evaluated.

    `quniform a,b,q` becomes a choice among the multiples of q from a to b, each as likely as the others (hyperopt's
    lets those at the ends come up half as often), whole numbers where a, b and q are.

    Raises:
        UserError: no such file, an unknown distribution, a bad range, nothing in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"params='{path}': {getattr(error, 'strerror', None) or error}; name a file with the search space") from error
    given = _from_yaml(path) if path.suffix in (".yaml", ".yml") else _from_lines(path, text)
    if not given:
        raise UserError(f"params='{path}' is empty: lines such as 'hidden_size choice [64,128]' are needed")
    return {key: _checked(f"params='{path}', {key}", *distribution) for key, distribution in given.items()}


def _from_yaml(path):
    """key -> (name of the distribution, its arguments)."""
    given = {}
    for key, entry in read_yaml(path).items():
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"params='{path}', {key}: one distribution is needed, such as {{choice: [64, 128]}}, not {entry!r}")
        given[str(key)] = next(iter(entry.items()))
    return given


def _from_lines(path, text):
    """key -> (name of the distribution, its arguments), the exponents of loguniform resolved."""
    given = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where, parts = f"params='{path}', line {number}", line.split(maxsplit=2)
        if len(parts) < 3:
            raise UserError(f"{where}: '{line.strip()}': a key, a distribution and its values are needed, such as 'hidden_size choice [64,128]'")
        key, name, values = parts
        if key in given:
            raise UserError(f"{where}: {key} is there twice")
        try:
            arguments = ast.literal_eval(values if name == "choice" else f"[{values}]")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{where}: cannot read '{values}'; write numbers as -8,0 and choices as [64,128] or ['a','b']") from None
        if name == "loguniform":
            arguments = [_exp(value) for value in _numbers(f"{where}: {key}", name, arguments)]
        given[key] = name, arguments
    return given


def _exp(exponent):
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def _checked(where, name, arguments):
    """One distribution with its arguments in order, as in the file's head."""
    if name not in _SIZES:
        raise unknown(f"distribution in {where}:", name, _SIZES)
    if name == "choice":
        if not isinstance(arguments, (list, tuple)) or not arguments:
            raise UserError(f"{where}: choice {arguments!r}: a list of values is needed, such as [64,128]")
        try:
            return {name: json.loads(json.dumps(arguments))}  # tuples become lists, as YAML has them
        except (TypeError, ValueError):
            raise UserError(f"{where}: choice {arguments!r}: numbers, strings, True, False, None and lists of them are needed") from None
    low, high, *step = _numbers(where, name, arguments)
    if not low < high:
        raise UserError(f"{where}: {name} {low},{high}: the lower end has to come first")
    if name == "loguniform" and low <= 0:
        raise UserError(
            f"{where}: loguniform {low},{high}: both ends have to be above 0; YAML takes the values themselves, "
            "RecBole's own format their exponents of e"
        )
    if name != "quniform":
        return {name: [float(low), float(high)]}
    q = step[0]
    if q <= 0:
        raise UserError(f"{where}: quniform {low},{high},{q}: the step q has to be above 0")
    first, last = math.ceil(round(low / q, _DIGITS)), math.floor(round(high / q, _DIGITS))
    if first > last:
        raise UserError(f"{where}: quniform {low},{high},{q}: no multiple of {q} lies between")
    whole = all(float(value).is_integer() for value in (low, high, q))
    return {"choice": [int(k * q) if whole else round(k * q, _DIGITS) for k in range(first, last + 1)]}


def _numbers(where, name, arguments):
    """The arguments, as many finite numbers as the distribution takes."""
    is_list = isinstance(arguments, (list, tuple))
    good = is_list and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in arguments)
    if not good or len(arguments) != _SIZES[name]:
        shown = ",".join(map(str, arguments)) if is_list else arguments
        raise UserError(f"{where}: {name} {shown}: {_SIZES[name]} finite numbers are needed")
    return arguments


def check_space(space, model, dataset, settings):
    """Hold every key of a space, and its ends or choices one by one, against what a run takes.

    Raises:
        UserError: a key that nothing reads, or that all trials share; a value that a run refuses.
    """
    valid = searchable_keys(model)
    for key, distribution in space.items():
        if key not in valid:
            hint = "trials share the data, the prompts and what they are compared on; such keys are set for all, with --key=value"
            if f"stage1.{key}" in valid:
                hint = f"a DPR model has one for each stage: stage1.{key}, stage2.{key}, stage3.{key}"
            raise unknown("key to search", key, valid, hint)
        ((_, values),) = distribution.items()
        for value in values:
            make_config(model, dataset, (), {**settings, key: value})
