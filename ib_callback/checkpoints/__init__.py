"""Trained models after the fact: found, fetched, loaded one at a time, and measured into one file of results."""
