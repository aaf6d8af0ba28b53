"""RecBole 1.2 on today's NumPy, pandas, PyTorch, SciPy and Ray.

RecBole 1.2 was written for NumPy 1, pandas 1 and PyTorch 1. Each patch below puts one
thing right, is applied only where the installed versions call for it, and says in its
docstring what goes wrong without it (issue numbers are RUCAIBox/RecBole's).

:func:`apply` is quick: RecBole, PyTorch, pandas and Ray are not imported. What has to
change inside a RecBole module changes when that module is imported (or at once, if it
already was).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from recbole_dpr.import_watch import Overlay, after_import, watch

__all__ = ["Patch", "applied", "apply"]


@dataclass(frozen=True)
class Patch:
    """One difference between RecBole 1.2 and the installed packages."""

    name: str
    """Short name, as `recbole-dpr doctor` shows it."""
    reason: str
    """What goes wrong without it."""
    applied: bool
    """False where the installed versions do not need it, or before :func:`apply`."""


@dataclass
class _Entry:
    name: str
    needed: Callable[[], bool]
    run: Callable[[], None]
    applied: bool = False

    @property
    def reason(self) -> str:
        return inspect.getdoc(self.run).split("\n\n")[0].replace("\n", " ")


_ENTRIES: list[_Entry] = []
_done = False


def apply() -> None:
    """Make RecBole work with the installed packages; a second call does nothing.

    Call it before the first use of RecBole, in every process.
    """
    global _done
    if _done:
        return
    _done = True
    for entry in _ENTRIES:
        if entry.needed():
            entry.run()
            entry.applied = True


def applied() -> list[Patch]:
    """Every patch, and whether :func:`apply` had to use it."""
    return [Patch(entry.name, entry.reason, entry.applied) for entry in _ENTRIES]


def _patch(name: str, needed: Callable[[], bool]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter a function into the list that :func:`apply` goes through."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        _ENTRIES.append(_Entry(name, needed, run))
        return run

    return register


# --- tools -----------------------------------------------------------------


def _version(package: str) -> tuple[int, int]:
    """(major, minor) of an installed package, (0, 0) without it; imports nothing."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _ignore(category: type[Warning], message: str = "", module: str = "") -> None:
    """Silence one warning that comes from one place."""
    warnings.filterwarnings("ignore", message=message, category=category, module=module)


# --- NumPy -----------------------------------------------------------------

# The names that RecBole reads, and what they stood for.
_NUMPY_NAMES = {
    "float_": "float64", "complex_": "complex128", "unicode_": "str_",
    "bool": "bool_", "int": "int_", "float": "float64", "complex": "complex128",
    "object": "object_", "str": "str_", "long": "int_", "unicode": "str_",
}  # fmt: skip


def _lost_numpy_names() -> list[str]:
    import numpy as np

    # vars(), as hasattr(np, "object") would warn
    return [name for name in _NUMPY_NAMES if name not in vars(np)]


@_patch("numpy-names", needed=lambda: bool(_lost_numpy_names()))
def _restore_numpy_names() -> None:
    """AttributeError: `np.float_` was removed (in Config), `np.float` (in the metrics); issues 1604, 2215.

    Config sets `np.float`, `np.int`, ... itself, but reads `np.float_`, `np.complex_` and
    `np.unicode_` for that, which NumPy 2 has not; the others are for RecBole code that
    runs where no Config was made.
    """
    import numpy as np

    for name in _lost_numpy_names():
        setattr(np, name, getattr(np, _NUMPY_NAMES[name]))


# --- pandas ----------------------------------------------------------------


def _recent_pandas() -> bool:
    return _version("pandas") >= (2, 1)  # which warns of what pandas 3 does


@_patch("pandas-fillna", needed=_recent_pandas)
def _fill_missing_values() -> None:
    """Missing values stay NaN; AttributeError: 'float' object has no attribute 'split' on empty list cells.

    RecBole fills columns by `df[field].fillna(..., inplace=True)`, which since pandas 3
    fills a copy. Here the columns are filled, with RecBole's own values, just before.
    pandas 2 still fills, with a FutureWarning.
    """

    @after_import("recbole.data.dataset.dataset")
    def patch(module: ModuleType) -> None:
        import pandas as pd

        module.pd = Overlay(pd, read_csv=_read_atomic_file)
        module.Dataset._fill_nan = _filling_first(module.Dataset._fill_nan)
        _ignore(pd.errors.ChainedAssignmentError, module=r"recbole\.data\.dataset")
        _ignore(FutureWarning, "A value is trying to be set on a copy", r"recbole\.data\.dataset")
        # columns of a pandas 3 frame are read-only arrays; RecBole drops the frame
        _ignore(UserWarning, "The given NumPy array is not writable", r"recbole\.data\.dataset")


def _read_atomic_file(*args: Any, **kwargs: Any) -> Any:
    """pandas.read_csv, with empty cells of list columns read as empty lists are written: ''."""
    import pandas as pd

    df = pd.read_csv(*args, **kwargs)
    lists = [column for column in df.columns if column.endswith("_seq")]  # "name:token_seq"
    return df.fillna(dict.fromkeys(lists, ""))


def _filling_first(fill_nan: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(fill_nan)
    def filled(self: Any) -> None:
        for feat_name in self.feat_name_list:
            feat = getattr(self, feat_name)
            for field in feat:
                _fill_column(feat, field, self.field2type[field].value)
        fill_nan(self)

    return filled


def _fill_column(feat: Any, field: str, ftype: str) -> None:
    if ftype == "token":
        feat[field] = feat[field].fillna(0)  # the id of [PAD]
    elif ftype == "float":
        feat[field] = feat[field].fillna(feat[field].mean())


@_patch("pandas-agg-len", needed=_recent_pandas)
def _lengths_per_row() -> None:
    """ValueError: Length of values (1) does not match length of index, once a list column is loaded.

    RecBole asks for the length of every list in a column by `column.agg(len)`. Since
    pandas 3 that is the length of the column; pandas 2 warns of it. None of the modules
    below takes the `len` of a column elsewhere.
    """
    _ignore(FutureWarning, "using .* in Series.agg cannot aggregate", r"recbole\.data\.dataset")

    @after_import(
        "recbole.data.dataset.dataset",
        "recbole.data.dataset.kg_dataset",
        "recbole.data.dataset.sequential_dataset",
    )
    def patch(module: ModuleType) -> None:
        module.len = _length


def _length(value: Any) -> Any:
    """The builtin len, but row by row for a column."""
    import pandas as pd

    return value.map(len) if isinstance(value, pd.Series) else len(value)


# --- PyTorch ---------------------------------------------------------------

_READ_CHECKPOINTS = (
    "recbole.trainer.trainer",
    "recbole.model.context_aware_recommender.kd_dagfm",
    "recbole.model.general_recommender.convncf",
    "recbole.model.general_recommender.nais",
    "recbole.model.general_recommender.neumf",
    "recbole.model.general_recommender.ract",
    "recbole.model.sequential_recommender.s3rec",
)


@_patch("torch-load", needed=lambda: _version("torch") >= (2, 6))
def _load_own_checkpoints() -> None:
    """UnpicklingError: Weights only load failed, on RecBole's own checkpoints; issues 2212, 2215.

    They hold the Config object, so they load with `weights_only=False` only, which can
    run code: load no RecBole checkpoint that you did not write. `torch.load` changes for
    the RecBole modules that read checkpoints, not for anybody else.
    """

    @after_import(*_READ_CHECKPOINTS)
    def patch(module: ModuleType) -> None:
        import torch

        module.torch = Overlay(torch, load=functools.partial(torch.load, weights_only=False))

    @after_import("recbole.quick_start.quick_start")
    def patch_quick_start(module: ModuleType) -> None:
        module.load_data_and_model = _trusting_the_file(module.load_data_and_model)
        _ignore(UserWarning, "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", r"recbole\.quick_start")


def _trusting_the_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that imports torch by itself, so that no overlay reaches it."""

    @functools.wraps(function)
    def trusting(*args: Any, **kwargs: Any) -> Any:
        with _environment("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"):
            return function(*args, **kwargs)

    return trusting


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@_patch("torch-gradscaler", needed=lambda: _version("torch") >= (2, 4))
def _hush_gradscaler() -> None:
    """FutureWarning: `torch.cuda.amp.GradScaler(args...)` is deprecated, on every epoch."""
    _ignore(FutureWarning, r"`torch\.cuda\.amp\.(GradScaler|autocast)", r"recbole\.trainer")


# --- SciPy -----------------------------------------------------------------


@_patch("scipy-dok-update", needed=lambda: _version("scipy") >= (1, 13))
def _restore_dok_update() -> None:
    """AttributeError: 'dok_matrix' object has no attribute '_update', in LightGCN and other graphs; issues 2034, 2090.

    The private method went with SciPy 1.13, and RecBole's graph models fill their
    adjacency matrices by it.
    """

    @after_import("recbole.model.abstract_recommender")
    def patch(module: ModuleType) -> None:
        from scipy.sparse import dok_matrix

        if not hasattr(dok_matrix, "_update"):
            dok_matrix._update = lambda self, entries: self._dict.update(entries)


# --- packages that RecBole imports unasked ---------------------------------

# module that imports it: (package, what to install)
_UNASKED = {
    "recbole.model.general_recommender.ldiffrec": ("kmeans_pytorch", "kmeans-pytorch"),
    "recbole.model.exlib_recommender.lightgbm": ("lightgbm", "lightgbm"),
    "recbole.model.exlib_recommender.xgboost": ("xgboost", "xgboost"),
    "recbole.quick_start.quick_start": ("ray", "'ray[tune]'"),
}


class _NotInstalled(ModuleType):
    """Stands for a package, and for anything in it, until somebody uses it."""

    def __init__(self, package: str, install: str) -> None:
        super().__init__(package)
        self.__dict__["_install"] = install

    def __getattr__(self, name: str) -> "_NotInstalled":
        if name.startswith("__"):
            raise AttributeError(name)
        return _NotInstalled(f"{self.__name__}.{name}", self._install)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{self.__name__} is not installed: pip install {self._install}")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        # LightGBM and XGBoost are subclasses: their class can be made, their objects cannot
        return (type(self.__name__, (), {"__init__": self}),)


@_patch("unasked-imports", needed=lambda: any(_missing(package) for package, _ in _UNASKED.values()))
def _do_without_unasked_packages() -> None:
    """ModuleNotFoundError: kmeans_pytorch (any model), lightgbm (an unknown model), ray (quick_start); issue 1518.

    RecBole imports these packages, and xgboost, for what nobody asked for. A stand-in
    takes their place while the module in question is imported, and says what to install
    when it is used.
    """
    for module, (package, install) in _UNASKED.items():
        if _missing(package):
            watch.add(module, functools.partial(_stand_in, package, install))


@contextmanager
def _stand_in(package: str, install: str, module: ModuleType) -> Iterator[None]:
    sys.modules[package] = _NotInstalled(package, install)
    try:
        yield
    finally:
        del sys.modules[package]


# --- autograd --------------------------------------------------------------


@_patch("anomaly-mode", needed=lambda: True)
def _keep_anomaly_mode() -> None:
    """Training is several times slower: RecBole's SINE, imported with all other models, turns anomaly detection on for the whole process."""
    watch.add("recbole.model.sequential_recommender.sine", _anomaly_mode_kept)


@contextmanager
def _anomaly_mode_kept(module: ModuleType) -> Iterator[None]:
    import torch

    imported_before = hasattr(module, "SINE")
    before = torch.is_anomaly_enabled() and not imported_before
    yield
    torch.autograd.set_detect_anomaly(before)


# --- Ray -------------------------------------------------------------------


@_patch("ray-report", needed=lambda: _version("ray") > (0, 0))
def _report_to_ray() -> None:
    """TypeError: report() got an unexpected keyword argument, in quick_start.objective_function under a current Ray."""

    @after_import("recbole.quick_start.quick_start")
    def patch(module: ModuleType) -> None:
        tune = module.tune
        if "metrics" in inspect.signature(tune.report).parameters:
            module.tune = Overlay(tune, report=lambda **metrics: tune.report(metrics))


class _NoLog:
    """Takes what a SummaryWriter takes."""

    def __getattr__(self, name):
        return lambda *_, **__: None


@contextmanager
def tensorboard_in(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Trainers made in this block log to `folder`, or nothing; RecBole has `log_tensorboard/` of the working directory fixed."""
    trainer = importlib.import_module("recbole.trainer.trainer")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    original = trainer.get_tensorboard
    trainer.get_tensorboard = lambda logger: writer(str(folder)) if folder else _NoLog()
    try:
        yield
    finally:
        trainer.get_tensorboard = original


@contextmanager
def parsing_in_c() -> Iterator[None]:
    """RecBole parses atomic files by pandas' parser in C here, not by the one in Python, which a separator of several characters needs."""
    module = importlib.import_module("recbole.data.dataset.dataset")
    original = module.pd

    def read_csv(*args: Any, **kwargs: Any) -> Any:
        return original.read_csv(*args, **{**kwargs, "engine": "c" if len(kwargs["delimiter"]) == 1 else kwargs["engine"]})

    module.pd = Overlay(original, read_csv=read_csv)
    try:
        yield
    finally:
        module.pd = original
