"""Measuring: from a probe and a model to one measurement."""
