"""Tests use the default encoder from its wheel and never ask a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
