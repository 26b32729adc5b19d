"""The Information Bottleneck curve of a joint distribution, or of a probe."""
