"""The callback for HuggingFace's Trainer: `from ib_callback.hf import IBCallback`."""

from ib_callback.hf.callback import IBCallback

__all__ = ["IBCallback"]
