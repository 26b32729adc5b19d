"""The plan of a measurement: all that depends on the probe alone, computed once."""
