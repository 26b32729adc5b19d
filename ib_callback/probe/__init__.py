"""Probes: frozen, tokenised, held-out text with labels; how they are built, stored and compared with training data."""
