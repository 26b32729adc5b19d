"""`ib-callback demo`: a small language model learns English on the CPU, with the callback, in about two minutes.

The model is a small Llama with random weights, and the trainer is HuggingFace's. The text is there in every
installation (`ib_callback.probe.builtin_text`). All that is said of the run is computed from its trajectory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import shutil
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ib_callback.analysis.replay import first_stop
from ib_callback.common.optional import require
from ib_callback.probe.probe import Probe, builtin_text
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import PLANES
from ib_callback.results.selection import Selection
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import FILENAME, Trajectory, aligned, check_writable
from ib_callback.run.run import PLANE_FILENAME
from ib_callback.run.schedule import At
from ib_callback.run.schedule import every as every_nth

WIDTH = 64
LAYERS = 2
BLOCK = 128  # tokens in a training sequence
BATCH = 8  # sequences in an optimizer step
PROBE_SEQUENCES = 128
TEXTS: int | None = None  # of the training text; None: all
STEPS = 1000
QUICK_STEPS = 80
# Chosen so that the second phase shows: see `_RATE_NOTE`.
LEARNING_RATE = 4e-3
WARMUP = 50  # steps
# Dense where the representations collapse, in the first steps.
POINTS = (0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 200, *range(250, 1001, 50))
ANNOTATED_FILENAME = "annotated_plane.png"
_PURPOSE = "The demonstration"
_RATE_NOTE = (
    "The learning rate was chosen so that the second phase shows. At half of it no second phase showed, and the loss "
    "ended 0.022 lower (one seed each). With other seeds or sizes the second phase may not come."
)
_QUICK_NOTE = "This quick run is too short for the phases. Without --quick the run takes about two minutes."
# Rows of the table, besides those that have a remark.
_ROWS = 10
# A collapse: before the fit, complexity falls by more than this share, as for the phases.
_COLLAPSE = 1 / 3
_WIDEST = 100


def run_demo(
    *,
    steps: int | None = None,
    minutes: float = 3.0,
    every: int | None = None,
    output_dir: str | os.PathLike[str] = "ib_demo",
    seed: int = 0,
    threads: int = 1,
    quick: bool = False,
) -> Trajectory:
    """Pre-train, measure, and print what the numbers say.

    Args:
        steps: optimizer steps, of 1,024 tokens each; by default 1,000, and 80 if `quick`.
        minutes: after how long the training ends, however many steps are done.
        every: steps between measurements; by default often at first, and every 50 steps later.
        output_dir: where everything is written.
        seed: of the weights and of the order of the text.
        threads: CPU threads. So small a model gains little from a second one, and on a busy machine loses much.
        quick: whether the run is to be short, too short for the phases.

    Raises:
        ImportError: a package of the extra `demo` that it cannot do without is missing.
        TrajectoryError: the directory cannot be written.
    """
    began = time.perf_counter()
    steps = steps or (QUICK_STEPS if quick else STEPS)
    directory = Path(output_dir)
    check_writable(directory)
    _contain(directory)
    _say(
        "A small language model learns English on this machine's CPU, and the callback measures it as it learns: "
        f"{steps:,} steps of {BATCH * BLOCK:,} tokens, {minutes:g} minutes at most."
    )
    transformers = require("transformers", extra="demo", purpose=_PURPOSE)
    require("accelerate", extra="demo", purpose=_PURPOSE)
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()):
        _ = transformers.Trainer  # its import prints a line if WANDB_MODE is offline
    torch.set_num_threads(threads)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=builtin_text.default_tokenizer(), eos_token=builtin_text.END_OF_TEXT
    )
    blocks = _blocks(builtin_text.split()[0][:TEXTS], tokenizer)
    probe = Probe.builtin(tokenizer, num_sequences=PROBE_SEQUENCES, max_length=BLOCK)
    transformers.set_seed(seed)
    model = _model(len(tokenizer))
    _say(f"text   {builtin_text.CORPUS}: {blocks.numel():,} tokens to train on", indent=" " * 7)
    _say(f"probe  {len(probe)} sequences held out from it, {probe.num_tokens:,} tokens: the text that is measured")
    _say(f"model  {type(model).__name__}, {LAYERS} layers of width {WIDTH}, {model.num_parameters():,} parameters")
    _say(_QUICK_NOTE if quick else _RATE_NOTE)

    wandb_run = _open_wandb_run(directory)
    try:
        trainer, callback = _trainer(model, blocks, probe, directory, steps, every, seed, wandb_run is not None)
        trainer.add_callback(_deadline(began + 60 * minutes))
        trainer.train()
    finally:
        if wandb_run is not None:
            wandb_run.finish()

    trajectory = callback.trajectory
    done = trainer.state.global_step
    if done < steps:
        _say(
            f"\nThe training was ended at step {done:,} of {steps:,}, after {minutes:g} minutes. "
            f"--minutes {2 * minutes:g} lets it run longer."
        )
    story = Story(trajectory)
    print("\n" + story.table())
    print("\nWhat this run shows")
    for sentence in story.sentences():
        _say(f"- {sentence}", indent="  ")
    _draw(trajectory, directory / ANNOTATED_FILENAME)
    _print_places(directory, wandb_run)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    return trajectory


def _say(text: str, indent: str = "") -> None:
    """Print a text in lines that the terminal has room for."""
    width = max(40, min(_WIDEST, shutil.get_terminal_size().columns))
    start = "\n" if text.startswith("\n") else ""
    print(start + "\n".join(textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)))


def schedule_of(steps: int) -> At:
    """When to measure a run of so many steps.

    >>> schedule = schedule_of(3000)
    >>> [step for step in range(900, 1301) if schedule(step)]
    [900, 950, 1000, 1075, 1150, 1225, 1300]
    """
    later = range(STEPS, steps, max(50, steps // 40))
    return At(frozenset(step for step in (*POINTS, *later) if step < steps))


class Story:
    """What a run shows, for a reader who sees such a run for the first time. It is computed from the trajectory.

    Args:
        trajectory: of the run.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.points = [point for point in trajectory if point.error is None and point.step is not None and point.orders]
        self.phases = trajectory.phases() if self.points else None
        self.remarks: dict[int | None, list[str]] = {}
        if len(self.points) < 2:
            return
        first, last = self.points[0], self.points[-1]
        self.collapse = self._collapse()
        self.published = self._chosen(Selection("complexity", mode="min", select_from=0, guard=None))
        self.guarded = self._chosen(Selection())
        self.by_loss = self._chosen(Selection("loss", select_from=0)) if last.loss is not None else None
        self.published_stop = self._stopped_at(PlateauStopping(guard=None, arm="immediately"))
        self.guarded_stop = self._stopped_at(PlateauStopping())
        if not first.step:
            self._remark(first, "untrained")
        if self.collapse is not None:
            self._remark(self.collapse, "collapse: lowest complexity")
        assert self.phases is not None
        for name in ("fit", "compression", "memorising"):
            start = getattr(self.phases, f"{name}_start")
            at = next((point for point in self.points if point.step == start), None)
            self._remark(at, f"{'fitting' if name == 'fit' else name} begins")
        self._remark(self.published_stop, "published rule stops")
        self._remark(self.guarded_stop, "guarded rule stops")
        self._remark(self.guarded, "guarded rule keeps this")
        self._remark(self.by_loss, "lowest loss")
        self._remark(last, "trained")

    def _remark(self, point: Measurement | None, text: str) -> None:
        if point is not None:
            self.remarks.setdefault(point.step, []).append(text)

    def _collapse(self) -> Measurement | None:
        """The lowest plain complexity before the model fits; None if it is not far below what came before."""
        fit = None if self.phases is None else self.phases.fit_start
        early = [point for point in self.points if fit is None or point.step is None or point.step <= fit]
        lowest = min(early, key=_complexity)
        before = max(_complexity(point) for point in early[: early.index(lowest) + 1])
        return lowest if _complexity(lowest) < (1 - _COLLAPSE) * before else None

    def _chosen(self, rule: Selection) -> Measurement | None:
        choice = rule.choose(self.points)
        kept = choice.best or choice.fallback
        return None if kept is None else kept.measurement

    def _stopped_at(self, rule: PlateauStopping) -> Measurement | None:
        with warnings.catch_warnings():
            # Without a loss the rule says so, and the story does not need it.
            warnings.simplefilter("ignore")
            position, _ = first_stop(self.points, rule)
        return None if position is None else self.points[position]

    def table(self) -> str:
        """The points that matter, and what happens at them."""
        kept = {point.step for point in self.points if point.step in self.remarks}
        missing = max(0, min(_ROWS, len(self.points)) - len(kept))
        others = [point.step for point in self.points if point.step not in kept]
        if others and missing:
            kept |= {others[round((k + 0.5) * (len(others) - 1) / missing)] for k in range(missing)}
        rows: list[tuple[str, ...]] = [
            ("", "held-out", "score of", "readout plane", "", "hidden states", "", ""),
            ("step", "loss", "predictions", "complexity", "expressivity", "complexity", "distance", ""),
        ]
        for point in self.points:
            if point.step not in kept:
                continue
            readout = self._readout(point)
            plain = point[point.primary or next(iter(point.orders))]
            numbers = (
                _number(point.loss, 3), _number(next(iter(point.shown_first().values())), 4),
                *(_number(value, 3) for value in (*readout, plain.complexity, plain.distance_to_bound)),
            )  # fmt: skip
            rows.append((f"{point.step:,}", *numbers, ", ".join(self.remarks.get(point.step, []))))
        return "\n".join(line.rstrip() for line in aligned(rows, (*[str.rjust] * 7, str.ljust)))

    def _readout(self, point: Measurement) -> tuple[float | None, float | None]:
        """Complexity and expressivity on the plane on which phases are read."""
        view, suffix = PLANES[(self.phases and self.phases.plane) or "plain"]
        order = point.primary or next(iter(point.orders))
        name = f"{view}/{order}" if view else order
        if name not in point:
            return None, None
        return getattr(point[name], f"complexity{suffix}"), getattr(point[name], f"expressivity{suffix}")

    def sentences(self) -> list[str]:
        """What happened, and what rules would have made of it."""
        if len(self.points) < 2 or self.phases is None:
            return ["Fewer than two points could be measured, so nothing can be concluded."]
        return [*self._course(), *self._rules()]

    def _course(self) -> Iterator[str]:
        first, last = self.points[0], self.points[-1]
        yield (
            "Complexity is how much the model's hidden states tell about the text before a token, expressivity how "
            "much they tell about the text after it. Both are fractions of the largest possible value. Their "
            "difference is the distance to the bound."
        )
        if not first.step and first.loss is not None:
            yield (
                f"Untrained: the states already have complexity {_complexity(first):.3f}, because random layers pass "
                f"their input on. The loss is {first.loss:.2f}. High complexity is not learning."
            )
        if self.collapse is not None:
            yield (
                f"Collapse: by step {self.collapse.step:,} complexity has fallen to {_complexity(self.collapse):.3f}. "
                "The states tell little about the text then. Low complexity is not learning either."
            )
        else:
            yield "Collapse: this run shows none at the measured steps."
        yield self._phases_sentence()
        scores = [next(iter(point.shown_first().values())) for point in (first, last)]
        if None not in scores and first.loss is not None and last.loss is not None:
            yield (
                f"The score of the predictions went from {scores[0]:.3f} to {scores[1]:.3f} while the loss went from "
                f"{first.loss:.2f} to {last.loss:.2f}. In our study (docs/evidence.md) this score had the right "
                "sign in every run."
            )

    def _phases_sentence(self) -> str:
        found = self.phases
        assert found is not None
        last = self.points[-1]
        if found.fit_start is None:
            return f"Phases: this run did not reach the fitting phase within {last.step:,} steps."
        by_step = {point.step: self._readout(point) for point in self.points}
        where = f"on the {(found.plane or 'plain').replace('_', ' ')} plane"
        reads = " (the states as the output layer reads them)" if found.plane == "readout" else ""
        text = f"Phases, {where}{reads}: fitting begins at step {found.fit_start:,}, and expressivity grows."
        if found.compression_start is None:
            text += " This run did not reach the compression phase."
        else:
            pairs = zip(by_step[found.compression_start], by_step[last.step], strict=True)
            (c0, c1), (e0, e1) = pairs
            text += (
                f" Compression begins at step {found.compression_start:,} (clear from step "
                f"{found.compression_recognised:,}): complexity goes from {_number(c0, 3)} to {_number(c1, 3)}, "
                f"expressivity from {_number(e0, 3)} to {_number(e1, 3)}."
            )
        if found.memorising_start is not None:
            text += f" Memorising begins at step {found.memorising_start:,}."
        return text

    def _rules(self) -> Iterator[str]:
        published, last = self.published, self.points[-1]
        nearest = min(self.points, key=_distance)
        if published is not None:
            same = " This is the collapsed model." if published is self.collapse else ""
            yield f'The published rule "keep the most compressed checkpoint" would keep {_at(published)}.{same}'
        stop = self.published_stop
        yield (
            f"The distance of the hidden states to the bound is lowest at step {nearest.step:,}, "
            f"{_distance(nearest):.3f}, and {_distance(last):.3f} at the end. The published rule "
            '"stop when the distance no longer falls", applied from the first step on, would '
            + (f"stop at {_at(stop)}." if stop is not None else "not stop this run.")
        )
        stop = self.guarded_stop
        text = "The rules of this package look at the loss too (the guard). They would "
        text += f"stop at {_at(stop)}" if stop is not None else "not stop this run"
        if self.guarded is not None:
            text += f", and keep {_at(self.guarded)}"
        else:
            text += ", and keep the lowest loss, because there is no compression phase to choose from"
        if self.by_loss is not None:
            text += f". The lowest loss is at {_at(self.by_loss)}; it is the safest choice"
        yield f"{text}."


def _complexity(point: Measurement) -> float:
    value = point[point.primary or next(iter(point.orders))].complexity
    return math.inf if value is None else value


def _distance(point: Measurement) -> float:
    value = point[point.primary or next(iter(point.orders))].distance_to_bound
    return math.inf if value is None else value


def _at(point: Measurement) -> str:
    return f"step {point.step:,}" + ("" if point.loss is None else f" (loss {point.loss:.2f})")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _draw(trajectory: Trajectory, path: Path) -> None:
    """Draw the picture of README of this run, if Matplotlib is installed and there is a point to draw."""
    if importlib.util.find_spec("matplotlib") is None or not any(point.orders for point in trajectory):
        return
    from ib_callback.plot import annotated_plane, save

    save(annotated_plane(trajectory), path)


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

    schedule = schedule_of(steps) if every is None else every_nth(every)
    # The table at the end has the points that matter; a line for each of them would hide it.
    callback = IBCallback(probe, every_n_steps=schedule, progress=False, console=False)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(WARMUP, steps // 2),
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


def _print_places(directory: Path, wandb_run: Any | None) -> None:
    """The files of the run, and what to do next."""
    places = {
        directory / ANNOTATED_FILENAME: "this run as one picture, with the untrained model and the bound named",
        directory / PLANE_FILENAME: "the same run on every plane",
        directory / FILENAME: "all numbers, one line per measurement",
    }
    found = {os.path.relpath(path): text for path, text in places.items() if path.exists()}
    commands = {}
    if wandb_run is not None:
        place = os.path.relpath(Path(wandb_run.dir).parent) if wandb_run.offline else wandb_run.url
        found[str(place)] = "the run in W&B" + (" (offline)" if wandb_run.offline else "")
        if wandb_run.offline:
            commands[f"wandb sync {place}"] = "upload it to W&B"
    run = os.path.relpath(directory)
    commands = {
        f"ib-callback report {run}": "everything that this run shows, with the numbers",
        f"ib-callback plot {run} --kind steps": "a picture of all numbers over the steps",
        **commands,
    }
    for title, lines in {"Files": found, "Next": commands}.items():
        width = max(map(len, lines))
        print(f"\n{title}")
        for line, text in lines.items():
            print(f"  {line:{width}}  {text}")
