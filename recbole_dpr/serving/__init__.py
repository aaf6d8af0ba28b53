"""A trained model answering requests."""
