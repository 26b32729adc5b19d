"""Numbers without tensors: one measurement, the measurements of a run, and rules (phases, stopping, selection)."""
