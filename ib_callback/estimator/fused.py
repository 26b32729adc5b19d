"""Stand-in until the kernels are merged."""
import torch
MOST_BINS = 1024
def available(device): return False
def quantise(*a): raise NotImplementedError
def entropies(*a): raise NotImplementedError
