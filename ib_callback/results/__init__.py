"""Numbers without tensors: one measurement, a run of them, and the rules that read it (phases, stopping, selection)."""
