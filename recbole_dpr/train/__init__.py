"""Stages 1 to 3 over RecBole's Trainer; checkpoints."""
