"""Vectors -> scores."""

from recbole_dpr.model.dpr import MODELS, is_promptable, promptable

__all__ = ["MODELS", "is_promptable", "promptable"]
