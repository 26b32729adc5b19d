"""`ib-callback demo`: a small decoder learns English on the CPU, with the callback, in a few minutes.

A real architecture of transformers, from scratch, and the real Trainer; the text is what every installation
has (`ib_callback.probe.builtin_text`).
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ib_callback.analysis.report import report
from ib_callback.cli.report import told
from ib_callback.common.optional import require
from ib_callback.probe.probe import Probe, builtin_text
from ib_callback.results.trajectory import FILENAME, Trajectory, check_writable
from ib_callback.run.run import PLANE_FILENAME
from ib_callback.run.schedule import every as every_nth
from ib_callback.run.schedule import logarithmic

WIDTH = 128
LAYERS = 4
BLOCK = 128  # tokens in a training sequence
BATCH = 8  # sequences in an optimizer step
PROBE_SEQUENCES = 128
LEARNING_RATE = 2e-3
WARMUP = 0.05  # of the steps
_PURPOSE = "The demonstration"


def run_demo(
    *,
    steps: int = 600,
    minutes: float = 3.0,
    every: int | None = None,
    output_dir: str | os.PathLike[str] = "ib_demo",
    seed: int = 0,
    threads: int = 1,
) -> Trajectory:
    """Pre-train, measure, and print what the numbers say.

    Args:
        steps: optimizer steps, of 1,024 tokens each.
        minutes: after how long the training ends, however many steps are done.
        every: steps between measurements; by default 4 in each power of ten.
        output_dir: where everything is written.
        seed: of the weights and of the order of the text.
        threads: CPU threads. So small a model gains little from a second one, and on a busy machine loses much.

    Raises:
        ImportError: a package of the extra `demo` that it cannot do without is missing.
        TrajectoryError: the directory cannot be written.
    """
    began = time.perf_counter()
    directory = Path(output_dir)
    check_writable(directory)
    _contain(directory)
    print(f"Pre-training a small decoder on the CPU, measured as it learns: {steps} steps, or {minutes:g} minutes.")
    transformers = require("transformers", extra="demo", purpose=_PURPOSE)
    require("accelerate", extra="demo", purpose=_PURPOSE)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=builtin_text.default_tokenizer(), eos_token=builtin_text.END_OF_TEXT
    )
    blocks = _blocks(builtin_text.split()[0], tokenizer)
    probe = Probe.builtin(tokenizer, num_sequences=PROBE_SEQUENCES, max_length=BLOCK)
    transformers.set_seed(seed)
    model = _model(len(tokenizer))
    print(f"text   {builtin_text.CORPUS}: {blocks.numel():,} tokens to train on")
    print(f"probe  {len(probe)} sequences held out of it, {probe.num_tokens:,} tokens")
    print(f"model  {type(model).__name__}, {LAYERS} layers of width {WIDTH}, {model.num_parameters():,} parameters")

    wandb_run = _open_wandb_run(directory)
    try:
        trainer, callback = _trainer(model, blocks, probe, directory, steps, every, seed, wandb_run is not None)
        trainer.add_callback(_deadline(began + 60 * minutes))
        trainer.train()
    finally:
        if wandb_run is not None:
            wandb_run.finish()

    trajectory = callback.trajectory
    if trainer.state.global_step < steps:
        print(f"\nEnded after {minutes:g} minutes, at step {trainer.state.global_step} of {steps}.")
    print("\nInformation in fractions of log(num_bins), of the token order:")
    print(trajectory.table(loss=_loss_around(trajectory, trainer.state.log_history)))
    print()
    print(told([report(trajectory)]))
    print()
    _print_places(directory, wandb_run)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    return trajectory


def _contain(directory: Path) -> None:
    """Caches go below the output directory, and nothing asks the network; whatever the user has set stays."""
    cache = directory.resolve() / ".cache"
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "WANDB_CACHE_DIR": str(cache / "wandb"),
        "WANDB_DATA_DIR": str(cache / "wandb"),  # where tables are staged
    }.items():
        os.environ.setdefault(name, value)


def _blocks(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """The texts one after another, with the end-of-text token between, cut into rows: [rows, BLOCK]."""
    end = tokenizer.eos_token_id
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (*text, end)]
    rows = len(ids) // BLOCK
    return torch.tensor(ids[: rows * BLOCK]).view(rows, BLOCK)


def _model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=BLOCK,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def _trainer(
    model: Any,
    blocks: torch.Tensor,
    probe: Probe,
    directory: Path,
    steps: int,
    every: int | None,
    seed: int,
    wandb: bool,
) -> tuple[Any, Any]:
    from transformers import ProgressCallback, Trainer, TrainingArguments

    from ib_callback.hf.callback import IBCallback

    class Bar(ProgressCallback):
        """The Trainer's own bar, with the loss in it instead of a line for each log."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{logs['loss']:.2f}", refresh=False)

    schedule = logarithmic(per_decade=4) if every is None else every_nth(every)
    callback = IBCallback(probe, every_n_steps=schedule, progress=False)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP * steps),
        logging_steps=1,
        save_strategy="no",
        report_to=["wandb"] if wandb else "none",
        include_num_input_tokens_seen="all",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=False,
        seed=seed,
    )
    rows = [{"input_ids": row, "labels": row} for row in blocks]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer, callback


def _deadline(moment: float) -> Any:
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        """Ends the training at a moment of `time.perf_counter`."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if time.perf_counter() > moment:
                control.should_training_stop = True

    return Deadline()


def _open_wandb_run(directory: Path) -> Any | None:
    """A run that the Trainer will find open: offline, unless the user is logged in; None without W&B."""
    wanted = os.environ.get("WANDB_MODE", "online")
    if importlib.util.find_spec("wandb") is None or wanted == "disabled":
        print(f"W&B    {'disabled' if wanted == 'disabled' else 'not installed'}, so nothing is logged there")
        return None
    import wandb
    from requests.utils import get_netrc_auth

    # Not logged in, wandb.init would ask on the terminal.
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    online = wanted == "online" and bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))
    modes: tuple[Literal["online", "offline"], ...] = ("online", "offline") if online else ("offline",)
    for mode in modes:
        try:
            return wandb.init(
                project="ib-callback-demo",
                dir=str(directory.resolve()),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=20),
            )
        except Exception as error:
            print(f"W&B    no {mode} run: {error}")
    return None


def _loss_around(trajectory: Trajectory, history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Mean training loss near each measured step; batches are small, so that single ones are noisy."""
    losses = {int(row["step"]): row["loss"] for row in history if "loss" in row}
    found = {}
    for step in trajectory.steps:
        if step is None:
            continue
        # The loss logged with step s + 1 was computed with the weights that step s left.
        near = [loss for s, loss in losses.items() if 0.95 * step < s <= 1.05 * step + 1]
        if near:
            found[step] = sum(near) / len(near)
    return found


def _print_places(directory: Path, wandb_run: Any | None) -> None:
    plane = directory / PLANE_FILENAME
    if plane.exists():
        print(f"information plane  {os.path.relpath(plane)}")
    print(f"trajectory         {os.path.relpath(directory / FILENAME)}")
    if wandb_run is not None:
        place = os.path.relpath(Path(wandb_run.dir).parent)
        print(f"W&B run            {place if wandb_run.offline else wandb_run.url}")
        if wandb_run.offline:
            print(f"                   upload it with: wandb sync {place}")
