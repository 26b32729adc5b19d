"""Versions of a real model, damaged more and more, each measured once by the product; and its loss with one scale."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import ib_callback as ib
from ib_callback.common.files import write_atomically

GROUPS = 16
# One in so many tokens decides the scale on the logits.
FITTED = 32
# One in so many tokens is looked at for the losses: a vocabulary of 262,144 makes all of them dear.
THINNED = 2


def shared() -> Any:
    """What benchmarks of real models share; looked for there for this alone, since others have well-known names."""
    with patch.object(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "benchmarks")]):
        import _common

        return _common


class States:
    """Hooks that keep the states [N, S, dim] behind the final norm and of the middle layer, of each probe sequence."""

    def __init__(self, model: Any, probe: ib.Probe) -> None:
        trunk = model.model
        self._rows = {row.numpy().tobytes(): number for number, row in enumerate(probe.input_ids)}
        self._here: list[int | None] = []
        self.found: dict[str, dict[int, Tensor]] = {"last": {}, "middle": {}}
        modules = {"last": trunk.norm, "middle": trunk.layers[len(trunk.layers) // 2 - 1]}
        self._hooks = [trunk.embed_tokens.register_forward_pre_hook(self._note)]
        self._hooks += [module.register_forward_hook(self._keep(name)) for name, module in modules.items()]

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._here = [self._rows.get(row.numpy().tobytes()) for row in inputs[0]]

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            for row, each in zip(self._here, states, strict=True):
                if row is not None:
                    self.found[name][row] = each.detach().clone()

        return keep

    def close(self) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        return {name: torch.stack([rows[n] for n in range(len(self._rows))]) for name, rows in self.found.items()}

    @staticmethod
    def save(states: dict[str, Tensor], path: Path) -> None:
        """In 16 bits; times `…_scale` where they are too large for them."""
        arrays: dict[str, np.ndarray] = {}
        for name, table in states.items():
            scale = max(1.0, float(table.abs().max()) / 60_000)
            arrays |= {name: (table / scale).half().numpy(), f"{name}_scale": np.array(scale)}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)


@torch.no_grad()
def losses(model: Any, probe: ib.Probe, last: Tensor) -> dict[str, Any]:
    """Mean next-token loss of each sequence, nats a token: as it is, and after one scale on the logits was fitted.

    The same tokens are looked at for every version.

    Args:
        model: that makes logits of its last states by its head and nothing else.
        probe: of whole sequences.
        last: [N, S, dim] states behind the final norm; the head alone is run again.
    """
    head = model.get_output_embeddings()
    ids = probe.input_ids

    def loss(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
        right = logits.gather(1, targets[:, None])[:, 0]
        return (logits * scale).logsumexp(1) - scale * right

    some, targets = last[:, :-1].flatten(0, 1)[::FITTED], ids[:, 1:].flatten()[::FITTED]
    logits = head(some).float()
    fitted = minimize_scalar(
        lambda log: float(loss(logits, targets, math.exp(log)).mean()),
        bounds=(-7, 2),
        method="bounded",
        options={"xatol": 0.01},
    )
    scale = math.exp(fitted.x)
    rows = []
    for number, (states, row) in enumerate(zip(last, ids, strict=True)):
        # Another residue in each sequence, so that all places in it count.
        places = torch.arange(number % THINNED, len(row) - 1, THINNED)
        logits, targets = head(states[places]), row[places + 1]
        rows.append([float(loss(logits.float(), targets, each).mean()) for each in (1.0, scale)])
    plain, refitted = zip(*rows, strict=True)
    return {"scale": scale, "loss": plain, "refitted": refitted}


@torch.no_grad()
def check_head(model: Any, ids: Tensor) -> None:
    """Raise a RuntimeError if the model makes more of its last states than its head does: a scale or a cap."""
    found = model(ids[:1], output_hidden_states=True)
    if not torch.allclose(found.logits, model.get_output_embeddings()(found.hidden_states[-1]), rtol=1e-3, atol=1e-3):
        raise RuntimeError("the logits are not those that the head makes of the last states")


def compute(
    model_folder: str,
    text: Path,
    kept: Path,
    *,
    sequences: int,
    length: int,
    groups: int,
    noise: Sequence[float],
    pruned: Sequence[float],
    only: Sequence[str] = (),
) -> str:
    """Measure each version whose file is not in `kept` yet; the name of the model.

    Under bfloat16 autocast, which is the precision that such models are published in: the trained SmolLM2's numbers
    are then those in float32 to two hundredths of their standard errors. States of the last and the middle layer are
    kept, too.

    Args:
        model_folder: NAME=FOLDER or NAME=FOLDER:FILE.gguf.
        text: .jsonl.gz.
        kept: folder for measurements and states.
        sequences: of the probe: the first documents that are long enough.
        length: of each.
        groups: of sequences, for standard errors.
        noise: levels.
        pruned: levels.
        only: names of versions; all if none are given.
    """
    folder = shared().ModelFolder.parse(model_folder)
    tokenizer, model = folder.load()
    probe = shared().whole_sequences(text, tokenizer, sequences, length)
    check_head(model, probe.input_ids)
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in probe.input_ids)
    meter = ib.Meter(
        probe,
        orders=("token", "bigram"),
        batch_size=4,
        standard_errors=groups,
        companions=("rankme", "alpha_req"),
    )
    kinds = [("trained", 0.0), ("untrained", 0.0), *(("noise", n) for n in noise), *(("pruned", p) for p in pruned)]
    for kind, level, make in shared().versions(model, [*kinds, ("shuffled", 0.0)]):
        name = f"{kind}_{level}" if level else kind
        path = kept / folder.name / f"{name}.json"
        if path.exists() or (only and name not in only):
            continue
        started = time.perf_counter()
        made = make()
        hooks = States(made, probe)
        with torch.autocast("cpu", torch.bfloat16):
            measurement = meter.measure(made)
            found = hooks.close()
            of_loss = losses(made, probe, found["last"])
        States.save(found, kept / "states" / folder.name / f"{name}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path,
            json.dumps(
                {
                    "kind": kind,
                    "level": level,
                    "num_bytes": num_bytes,
                    "num_tokens": len(probe) * (length - 1),
                    "losses": of_loss,
                    "measurement": measurement.to_dict(),
                }
            ).encode(),
        )
        print(
            f"{folder.name} {name}: loss {np.mean(of_loss['loss']):.3f}, refitted {np.mean(of_loss['refitted']):.3f}, "
            f"{measurement.seconds:.0f} s to measure, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    return folder.name
