"""The Information Bottleneck curve, of any joint distribution and of a probe."""
