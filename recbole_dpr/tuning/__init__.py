"""Searches for settings with Ray Tune: params file -> trials -> the best one's config."""
