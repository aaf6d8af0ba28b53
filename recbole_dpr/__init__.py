"""RecBole-DPR: promptable sequential recommendation for RecBole (arXiv:2602.18929)."""

from recbole_dpr import compat

compat.apply()  # before anything imports RecBole

__version__ = "0.1.0"
__all__ = ["Clause", "load", "parse_prompt", "run_dpr"]

_HOMES = {
    "run_dpr": "recbole_dpr.run",
    "load": "recbole_dpr.serving.recommender",
    "parse_prompt": "recbole_dpr.prompts.intent",
    "Clause": "recbole_dpr.prompts.intent",
}


def __getattr__(name):
    """Public names on first use: `import recbole_dpr` stays quick."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'recbole_dpr' has no attribute '{name}'")
