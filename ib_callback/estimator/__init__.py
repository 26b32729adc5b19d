"""The estimator: soft assignment to random directions, and information from its histograms. Pure functions."""
