"""Training runs of the studies: data, models, schedules, and the measuring of each by the product's own callback."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

import ib_callback as ib
from ib_callback.common.files import write_atomically
from ib_callback.hf import IBCallback

LENGTH = 128
VOCABULARY = 4096
# Novels, by their place in the file: the last ones are held out, of them the first for the probe.
HELD_OUT, OF_PROBE = 12, 6
PROBE_SEQUENCES, VALIDATION_SEQUENCES = 64, 256
# Steps between checkpoints, at least.
SAVE_EVERY = 50


@dataclass(frozen=True)
class Config:
    """One run.

    architecture: "llama" or "gpt2".
    layers, width, heads: of the model; tied: whether its head is that of its embeddings.
    steps, batch, rate: of training, with AdamW; rate warms up over `warmup` steps.
    schedule: what the rate does after that: "cosine" to a tenth, "constant", "wsd" (falls to nothing over the last
        fifth), "decayed" (falls to a hundredth over the first quarter, and stays there) or "spike" (constant, times 40
        from 24 % to 27 % of the steps).
    sequences: of training data that are seen again and again; None: ever new ones.
    seed: of weights and of the order of the data.
    halves: whether to measure on a second probe of other sequences of the same novels, too.
    points: how many are measured evenly, beside those of the first 200 steps.
    base: name of the run whose last weights this one begins with, in a folder beside its own; None: random ones.
    """

    name: str
    architecture: str
    layers: int
    width: int
    heads: int = 4
    tied: bool = True
    steps: int = 1000
    batch: int = 32
    rate: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    sequences: int | None = None
    seed: int = 0
    halves: bool = False
    points: int = 20
    base: str | None = None

    def measured_steps(self) -> list[int]:
        """About 30 by default: after every octave's half in the beginning, then evenly."""
        early = [4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 200]
        return sorted(
            {s for s in early if s < self.steps}
            | {round(self.steps * k / self.points) for k in range(1, self.points + 1)}
            | {0}
        )

    def rate_at(self, step: int) -> float:
        """As a share of `rate`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = step / self.steps
        if self.schedule == "cosine":
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        if self.schedule == "wsd":
            return min(1.0, 5.0 * (1.0 - done))
        if self.schedule == "decayed":
            return max(0.01, 1.0 - 4.0 * done)
        if self.schedule == "spike":
            return 40.0 if 0.24 <= done < 0.27 else 1.0
        return 1.0

    def model(self) -> nn.Module:
        """With random weights."""
        torch.manual_seed(self.seed)
        if self.architecture == "llama":
            return tf.LlamaForCausalLM(
                tf.LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=self.width,
                    intermediate_size=int(self.width * 8 / 3),
                    num_hidden_layers=self.layers,
                    num_attention_heads=self.heads,
                    max_position_embeddings=LENGTH,
                    tie_word_embeddings=self.tied,
                )
            )
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=self.width,
                n_layer=self.layers,
                n_head=self.heads,
                n_positions=LENGTH,
                tie_word_embeddings=self.tied,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


@dataclass(frozen=True)
class Data:
    """Sequences of tokens [N, LENGTH] of one tokenizer: for training, validation, probe, and of another domain."""

    training: np.ndarray
    validation: Tensor
    probe: Tensor
    other: Tensor
    other_validation: Tensor

    @classmethod
    def load(cls, folder: Path, cache: Path) -> Data:
        """From `novels.jsonl.gz` and `c4_sample.jsonl.gz` in a folder; tokenised once."""
        novels = [each["text"] for each in lines(folder / "novels.jsonl.gz")]
        tokenizer = _tokenizer(novels[:-HELD_OUT], cache / "tokenizer.json")
        held = novels[-HELD_OUT:]
        training = _tokens(tokenizer, novels[:-HELD_OUT], cache / "training.npy")
        probe, validation = (_tokens(tokenizer, part) for part in (held[:OF_PROBE], held[OF_PROBE:]))
        other = _tokens(tokenizer, [each["text"] for each in lines(folder / "c4_sample.jsonl.gz")])
        half = len(other) // 2
        return cls(
            training,
            *(
                torch.from_numpy(spread(part, number).astype(np.int64))
                for part, number in (
                    (validation, VALIDATION_SEQUENCES),
                    (probe, 4 * PROBE_SEQUENCES),
                    (other[:half], 4 * PROBE_SEQUENCES),
                    (other[half:], VALIDATION_SEQUENCES),
                )
            ),
        )


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _tokenizer(texts: Sequence[str], path: Path) -> Tokenizer:
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((text[:400_000] for text in texts), trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], path: Path | None = None) -> np.ndarray:
    """[N, LENGTH] one text behind the other."""
    if path is not None and path.exists():
        return np.load(path)
    ids = [np.array(each.ids, np.uint16) for each in tokenizer.encode_batch(list(texts))]
    flat = np.concatenate(ids)
    table = flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if path is not None:
        np.save(path, table)
    return table


def spread(table: np.ndarray, number: int) -> np.ndarray:
    """So many rows, evenly over the table."""
    return table[np.linspace(0, len(table), number, endpoint=False).astype(int)]


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training sequences in the order of a seed; the first few of them again and again if so many are given."""

    def __init__(self, table: np.ndarray, config: Config) -> None:
        generator = np.random.RandomState(config.seed)
        order = generator.permutation(len(table))
        total = config.steps * config.batch
        if config.sequences is not None:
            rounds = -(-total // config.sequences)
            order = np.concatenate([order[generator.permutation(config.sequences)] for _ in range(rounds)])
        if total > len(order):
            order = np.concatenate([order] * -(-total // len(order)))
        self._table, self._order = table, order[:total]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self._table[self._order[index]].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Task:
    """What a run is trained on and judged by, where that is not the novels and the losses alone.

    dataset: the training examples, in their order.
    trainer: that knows what to do with them.
    judges: what each says of the model at the measured points, as numbers by name.
    feature_probes: measured beside the probe of novels.
    """

    dataset: torch.utils.data.Dataset[dict[str, Tensor]]
    trainer: type[tf.Trainer] = tf.Trainer
    judges: Sequence[Callable[[nn.Module], dict[str, float]]] = ()
    feature_probes: Mapping[str, ib.Probe] = field(default_factory=dict)


class Losses(tf.TrainerCallback):
    """Losses on held-out sequences at the measured steps, and the weights; on disk at once, for a second start."""

    def __init__(self, config: Config, data: Data, folder: Path, judges: Sequence[Any] = ()) -> None:
        self._steps, self._file, self._weights = (
            set(config.measured_steps()),
            folder / "losses.json",
            folder / "weights",
        )
        self.found: dict[int, dict[str, float]] = {}
        if self._file.exists():
            self.found = {int(step): each for step, each in json.loads(self._file.read_text()).items()}
        self._weights.mkdir(parents=True, exist_ok=True)
        self._held_out = {"val_loss": data.validation, "c4_loss": data.other_validation}
        self._judges = judges

    def _measure(self, model: nn.Module, step: int) -> None:
        if step in self._steps and step not in self.found:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                self.found[step] = {
                    name: float(np.mean([float(model(input_ids=part, labels=part).loss) for part in table.split(32)]))
                    for name, table in self._held_out.items()
                }
                for judge in self._judges:
                    self.found[step] |= judge(model)
            model.train(was_training)
            torch.save(model.state_dict(), self._weights / f"{step}.pt")
            write_atomically(self._file, json.dumps(self.found).encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._measure(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._measure(model, state.global_step)


def meter_keywords() -> dict[str, Any]:
    """Settings of the measurements."""
    return {"orders": ("token", "bigram"), "center": True, "companions": ("rankme", "alpha_req"), "loss": "all"}


def weights_of(base: Path) -> dict[str, Tensor]:
    """The last weights of the run in this folder."""
    path = max((base / "weights").glob("*.pt"), key=lambda path: int(path.stem))
    return torch.load(path, weights_only=True)


class SaveMeasured(tf.TrainerCallback):
    """A checkpoint of the Trainer at every measured step."""

    def __init__(self, config: Config) -> None:
        self._steps = set(config.measured_steps())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step in self._steps


def train(
    config: Config, data: Data, folder: Path, task: Task | None = None, *, save_measured: bool = False
) -> dict[str, Any]:
    """Train and measure on both probes; what the study keeps of it. A run that was finished is not run again.

    A run that was killed goes on from its last checkpoint. With `save_measured` there is one of every measured step.
    """
    task = task or Task(Sequences(data.training, config))
    steps = set(config.measured_steps())
    probes = {"novels": data.probe[::4], "c4": data.other[::4]}
    if config.halves:
        probes["novels_b"] = data.probe[2::4]
    callbacks = [
        IBCallback(
            ib.Probe.from_tokens(table, name=name),
            every_n_steps=lambda step: step in steps,
            output_dir=folder / name,
            prefix=f"{name}/",
            log_plane=False,
            feature_probes=task.feature_probes if name == "novels" else {},
            **meter_keywords(),
        )
        for name, table in probes.items()
    ]
    arguments = tf.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=config.batch,
        max_steps=config.steps,
        learning_rate=config.rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        save_steps=config.steps if save_measured else max(SAVE_EVERY, config.steps // 4),
        save_total_limit=None if save_measured else 1,
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    model = config.model()
    if config.base is not None:
        model.load_state_dict(weights_of(folder.parent / config.base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate_at)
    held_out = Losses(config, data, folder, task.judges)
    trainer = task.trainer(
        model,
        arguments,
        train_dataset=task.dataset,
        callbacks=[held_out, *callbacks, *([SaveMeasured(config)] if save_measured else [])],
        optimizers=(optimizer, rates),
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    checkpoints = folder / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None)
    training = {each["step"]: each["loss"] for each in trainer.state.log_history if "loss" in each}
    return result(config, held_out.found, training, {name: folder / name for name in probes})


def result(
    config: Config, told: dict[int, dict[str, float]], training: dict[int, float], folders: dict[str, Path]
) -> dict[str, Any]:
    """What is kept of a run: losses, what else judges it, and the numbers of all probes, over the measured steps."""
    found: dict[str, Any] = {"config": asdict(config), "package": ib.__version__}
    for probe, folder in folders.items():
        points = list(ib.Trajectory.load(folder / f"{probe}_trajectory.jsonl"))
        columns: dict[str, list[float | None]] = {}
        for point in points:
            for name, value in point.scalars().items():
                if is_kept(name):
                    columns.setdefault(name, []).append(_rounded(value))
        found["step"] = [point.step for point in points]
        found[probe] = columns
        if probe == "novels":
            found["by_layer"] = {
                name: [[_rounded(each) for each in getattr(point["token"], f"{name}_by_layer")] for point in points]
                for name in ("complexity", "complexity_local", "expressivity_local")
            }
    found |= {name: [told[step][name] for step in found["step"]] for name in told[0]}
    logged = sorted(training)
    found["train_loss"] = [
        next((training[s] for s in reversed(logged) if s <= max(step, logged[0])), None) for step in found["step"]
    ]
    return found


@dataclass(frozen=True)
class Retraced:
    """A run's trajectory as its callback has it, against that from its checkpoints alone.

    Attributes:
        points: compared, step 0 among them.
        numbers: compared, of all points.
        equal: of these, how many bit for bit.
        largest: the greatest difference, and `where`.
    """

    points: int
    numbers: int
    equal: int
    largest: float
    where: str


def retrace(config: Config, data: Data, folder: Path) -> Retraced:
    """Train with a checkpoint at every measured step, and measure these by `ib-callback measure` in another process.

    Step 0, of which no trainer leaves a checkpoint, is the untrained model of the configuration, with the run's seed.

    Raises:
        ValueError: the two have other steps, settings or names of numbers.
        subprocess.CalledProcessError: the command has failed.
    """
    train(config, data, folder, save_measured=True)
    probe, results = folder / "novels.safetensors", folder / "retraced.jsonl"
    ib.Probe.from_tokens(data.probe[::4], name="novels").save(probe)
    options = [str(folder / "checkpoints"), "--probe", str(probe), "--name", config.name, "-o", str(results)]
    options += ["--initial", "--initial-seed", str(config.seed), *as_options(meter_keywords())]
    subprocess.run([sys.executable, "-m", "ib_callback", "measure", *options], check=True)
    followed = ib.Trajectory.load(folder / "novels" / "novels_trajectory.jsonl")
    return compared(followed, ib.Results.load(results)[config.name])


def as_options(keywords: Mapping[str, Any]) -> list[str]:
    """Keywords of `Meter` as options of `ib-callback measure`."""
    singular = {"orders": "order", "companions": "companion"}
    found = []
    for name, value in keywords.items():
        flag = f"--{singular.get(name, name).replace('_', '-')}"
        for each in value if isinstance(value, tuple) else [value]:
            found += [flag] if each is True else [flag, str(each)]
    return found


# What a line says that was not measured of the model: of the measuring, and what the loop has told.
_NOT_MEASURED = ("seconds", "overhead", "tokens_seen", "train_loss")


def compared(followed: ib.Trajectory, retraced: ib.Trajectory) -> Retraced:
    """All numbers of two trajectories that should be the same.

    Raises:
        ValueError: they have other steps, settings or names of numbers.
    """
    if followed.steps != retraced.steps:
        raise ValueError(f"expected the same steps, got {followed.steps} and {retraced.steps}")
    numbers, equal, largest, where = 0, 0, 0.0, "nowhere"
    for own, other in zip(followed, retraced, strict=True):
        mine, theirs = (_flat(point.to_dict()) for point in (own, other))
        for name in _NOT_MEASURED:
            mine.pop(name, None)
            theirs.pop(name, None)
        if unlike := [k for k in mine.keys() | theirs.keys() if type(mine.get(k)) is not type(theirs.get(k))]:
            raise ValueError(f"step {own.step}: expected the same numbers, got others as {sorted(unlike)[0]}")
        for name, value in mine.items():
            if isinstance(value, (str, bool)) or value is None:
                if value != theirs[name]:
                    raise ValueError(f"step {own.step}, {name}: expected the same, got {value!r} and {theirs[name]!r}")
                continue
            numbers += 1
            difference = abs(value - theirs[name])
            equal += difference == 0
            if not difference <= largest:
                largest, where = difference, f"step {own.step}, {name}"
    return Retraced(len(followed), numbers, equal, largest, where)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Whatever lies in nested dicts and lists, by its path."""
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, each in enumerate(value) for k, v in _flat(each, f"{name}/{key}").items()}
    return {name.removeprefix("/"): value}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


_RATIOS = ("optimality", "optimality_above_null")
_LOCAL = ("complexity_local", "expressivity_local", "optimality_local", "score_local")
_OF_PLANES = tuple(
    f"{side}{form}" for side in ("complexity", "expressivity") for form in ("", "_above_null", "_scaled")
)
_OF_FEATURES = ("information", "information_null", "information_null_std", "information_p_value", "ratio")
_WHOLE = ("loss", "bits_per_byte", "dispersion", "rankme", "alpha_req", "entropy", "ceiling")


def is_kept(name: str) -> bool:
    """Whether a study keeps a logged number: all that are held against the loss, and the sides of the planes."""
    view, _, quantity = name.rpartition("/")
    if not view:
        return quantity in _WHOLE
    if quantity.startswith(_OF_FEATURES[0]) or view.endswith("preference"):
        return quantity in (*_OF_FEATURES, "ratio_above_null")
    view, _, order = view.rpartition("/")
    plane = order == "token" and view in ("", "late", "last", "centred", "readout", "prediction")
    return quantity in (*_RATIOS, *_LOCAL) or (plane and quantity in (*_OF_PLANES, "distance_to_bound"))


def run_all(
    configs: Sequence[Config],
    data: Path,
    work: Path,
    results: Path,
    task: Callable[[Config], Task] | None = None,
) -> None:
    """Each run whose result is not there yet and that no other process is at; `task` says what of."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    loaded = None
    for config in configs:
        path = results / f"{config.name}.json"
        if path.exists():
            continue
        loaded = loaded or Data.load(data, work)
        (work / config.name).mkdir(exist_ok=True)
        with (work / config.name / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            found = train(config, loaded, work / config.name, task and task(config))
        write_atomically(path, json.dumps(found, separators=(",", ":")).encode())
        best, last = min(found["val_loss"]), found["val_loss"][-1]
        print(f"{config.name}: loss {best:.3f} at best, {last:.3f} in the end", flush=True)
