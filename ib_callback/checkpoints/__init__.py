"""Measure trained models after training: find, fetch and load checkpoints one at a time, into one file of results."""
