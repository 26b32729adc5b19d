"""The callback for Lightning's Trainer: `from ib_callback.lightning import IBCallback`."""

from ib_callback.lightning.callback import IBCallback

__all__ = ["IBCallback"]
