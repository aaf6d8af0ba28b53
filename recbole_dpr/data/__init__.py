"""Interactions -> sequences, targets and batches."""
