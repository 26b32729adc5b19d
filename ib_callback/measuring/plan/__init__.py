"""The plan of a measurement: everything that depends on the probe alone, computed once."""
