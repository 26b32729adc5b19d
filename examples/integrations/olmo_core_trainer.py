"""OLMo-core's Trainer: a callback of its kind over `ib.Run`."""

import _tiny
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import Callback

import ib_callback as ib


class IBCallback(Callback):
    def __init__(self, run: ib.Run) -> None:
        self.run = run

    def pre_train(self) -> None:
        self.run.__enter__()
        self.post_train_batch()

    def post_train_batch(self) -> None:
        if self.run.step(self.trainer.train_module.model, self.step):
            self.trainer.cancel_run("early stopping", no_sync=True)

    def post_train(self) -> None:
        self.run.__exit__(None, None, None)


probe = ib.Probe.builtin(num_sequences=32, max_length=64)
meter = ib.Meter(probe, layers=["blocks.*"], forward=lambda net, ids, mask: net(ids))
callbacks = {"ib": IBCallback(ib.Run(meter, output_dir="ib_out/olmo_core_trainer", every_n_steps=5))}
config = TrainerConfig("ib_out/olmo_core_trainer", max_duration=Duration.steps(15), callbacks=callbacks)
config.build(*_tiny.olmo_core("ib_out/olmo_core_data")).fit()  # a train module and a data loader
