"""Analyse finished runs and measured models: the published experiments, each as a function and a command."""
