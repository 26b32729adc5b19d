"""What is measured, one module for each kind: its labels, the histograms it keeps, and how it is read out."""
