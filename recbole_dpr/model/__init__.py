"""Vectors -> scores."""

from recbole_dpr.model.dpr import MODELS

__all__ = ["MODELS"]
