"""Measure a model on a probe, without any training framework. Both callbacks are built on this module."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ib_callback.bound.curve import IBCurve
from ib_callback.bound.probe_curve import probe_curve
from ib_callback.common.checks import check_bytes, check_integer
from ib_callback.common.errors import ModelError, ProbeError, RanksError, RepresentationError
from ib_callback.common.messages import warn
from ib_callback.common.progress import progress_bar
from ib_callback.common.ranks import Kept, Ranks, this_machine
from ib_callback.common.version import __version__
from ib_callback.estimator.functional import check_weighting
from ib_callback.estimator.quantise import check_seed, check_temperature
from ib_callback.measuring.accumulate import Accumulator, Sums
from ib_callback.measuring.companions import COMPANIONS
from ib_callback.measuring.model import access, bidirectional, crosscheck, head
from ib_callback.measuring.model.access import Layer, Layers
from ib_callback.measuring.model.capture import Moments, Quantiser
from ib_callback.measuring.model.codebook import (
    KEPT,
    NUMBER,
    Outcome,
    Prediction,
    Readout,
    dim_of,
    frequent_tokens,
)
from ib_callback.measuring.model.forward import (
    Forward,
    ProbeForward,
    accident,
    check_fit,
    free_memory,
    is_out_of_memory,
)
from ib_callback.measuring.model.guard import is_sharded, resharded, untouched
from ib_callback.measuring.model.loss import (
    Distributions,
    LossPass,
    Route,
    Routes,
    find_route,
    loss_numbers,
    number_of_pairs,
    reads_ahead,
    rows_at_a_time,
)
from ib_callback.measuring.model.parallel import parallelism
from ib_callback.measuring.model.parameters import ChangedParametersError, unchanged_parameters
from ib_callback.measuring.plan.builder import MAX_LABEL_SETS
from ib_callback.measuring.plan.file import read_plan, shared_plan
from ib_callback.measuring.plan.memory import Means, Need, bytes_of, cheaper, is_of_measuring, let_go, own_work, trim
from ib_callback.measuring.plan.plan import Batch, Plan
from ib_callback.measuring.plan.summary import PlanSummary, layers_of_rank
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.presets import takes_presets, tell_of_size
from ib_callback.measuring.quantities.documents import Documents, has_baseline
from ib_callback.measuring.quantities.features import Feature, too_few_pairs
from ib_callback.measuring.readout import read_out
from ib_callback.measuring.settings import (
    FeatureProbes,
    choose_baseline,
    choose_bound,
    choose_companions,
    choose_features,
    choose_groups,
    choose_layers,
    choose_loss,
    choose_primary,
    choose_process_group,
    label_names,
    named_features,
)
from ib_callback.measuring.team import Round, SharedAccumulator, Team, crews_of
from ib_callback.measuring.thinning import POSITIONS, pairs_for_loss, positions_for_prediction
from ib_callback.measuring.views import Views
from ib_callback.probe.ngrams import Positions, parse_orders, valid_positions
from ib_callback.probe.probe import Probe
from ib_callback.results.measurement import Measurement

# Bytes that `assignments` holds at a time if no budget is set.
_ASSIGNMENTS_MEMORY = 1 << 30


@dataclass(frozen=True)
class Preflight:
    """What a measurement will do, known before training time is spent.

    layers: names of the measured layers.
    num_sequences, num_positions: numbers of sequences and of valid positions in the probe.
    memory: bytes that a measurement needs in addition to the forward pass.
    passes: forward passes over the probe in one measurement; several if `memory_budget` requires groups of layers.
    feature_probes: (name, preflight) of each further probe.
    num_positions_local: number of positions behind the local numbers (see `baseline` in `Meter`); None if these are
        not measured.
    missing: which of "readout" and "prediction" the model does not have, and why.
    """

    layers: tuple[str, ...]
    num_sequences: int
    num_positions: int
    memory: int
    passes: int
    feature_probes: tuple[tuple[str, Preflight], ...] = ()
    num_positions_local: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for a console."""
        further = [f"; features of {name}: {of_probe._size()}" for name, of_probe in self.feature_probes]
        missing = [f"; no {name}: {why}" for name, why in self.missing.items()]
        size = f"{self._size()}{''.join(further)}{''.join(missing)}"
        return f"{len(self.layers)} layers ({self.layers[0]} … {self.layers[-1]}), {size}"

    def _size(self) -> str:
        passes = "" if self.passes == 1 else f" in {self.passes} passes"
        if self.num_positions_local is not None and self.num_positions_local < self.num_positions:
            passes += f"; local information uses {self.num_positions_local:,} of the positions"
        return (
            f"{self.num_sequences:,} sequences, {self.num_positions:,} valid positions, "
            f"{self.memory / 2**20:,.0f} MiB in addition to the forward pass{passes}"
        )


class Meter:
    """Measures complexity, expressivity and what follows from them, on a frozen probe.

    On first use the meter makes a plan for the probe, and keeps it. A measurement leaves no trace in the model or in
    any random state, and two measurements of the same model are bitwise equal. Forward hooks run during a measurement,
    because they may be part of the model. Hooks of loggers such as `wandb.watch` do not run.

    Args:
        probe: frozen held-out text.
        preset: `"paper"`, the literal definition of Conklin et al. (ICLR 2026), or `"paper-calibrated"`, the same at
            the calibrated temperature; measuring/presets.py cites the sections. A preset fixes `temperature` (1.0, or
            "calibrated"), `num_bins` (100), `weighting` ("uniform"), `bound` ("diagonal") and `draws` (1), and turns
            off `null`, `baseline`, `center`, `standard_errors`, `loss`, `readout` and `prediction`. Another value of
            one of these is an error. You choose everything else, also the probe. The published probe is
            `Probe.from_c4(tokenizer, num_sequences=10_000, max_length=512)`; with another size, one message says so.
        orders: n-gram orders of the context labels; the widest decides which positions are valid.
        primary: order that the headline numbers refer to; by default `token` if measured, else the first order.
        features: names of probe labels to measure information about; by default all.
        layers: `"hidden_states"`, `"blocks"`, module names or globs, or a callable model → modules.
        num_bins: number n of reference points.
        temperature: softmax temperature: `"calibrated"`, or a number.
        seed: seed of the reference points, and of the subsets and permutations of the nulls.
        weighting: weights of the labels in H(Z given X): `"empirical"`, by frequency, or `"uniform"`, all equal.
        bound: the line to which the distance is measured: `"diagonal"`, I(Y;Z) = I(X;Z), or `"ib_curve"`, the
            Information Bottleneck curve of the probe's own p(x, y) at the primary order, with as many codewords as
            bins. The curve is computed before the first measurement (some seconds to a minute) and kept in the
            user's cache directory.
        null: whether to estimate the null: the information that finite sampling alone gives.
        baseline: whether to measure the document baseline: the information that labels from far away in the same
            document give. Information above it is called local. Sequences with fewer than 48 valid positions are left
            out. There is no baseline if that would leave out over half of the positions, or with
            `weighting="uniform"`. True or "circular" shifts labels along a circle. "linear" pairs positions at one
            distance, for text that drifts along the document, and leaves out positions at one end. See
            docs/reading-the-numbers.md.
        baseline_offset: distance of a linear shift in valid positions, at least 16, or "half" for half of each
            sequence; None: 16.
        draws: number of sets of reference points. With several, `Measurement.averaged` holds means over all sets, and
            its standard errors include the spread between them; the plain numbers still use the first set. D draws
            take D times the time and memory of accumulation; the forward pass is shared.
        center: whether to measure the states also after removing the layer's mean unit state: `Measurement.centred`. A
            direction that all states share hides much of what they say. The mean is over all valid positions, which
            needs another pass before: a measurement costs twice as much.
        last_block: with layers="hidden_states", whether to measure also the last block before the final norm: the views
            "last_block" and "late_blocks" (a view is one way to read a measurement; see measuring/views.py).
        companions: comparison measures to compute: "rankme", "alpha_req" or both (measuring/companions.py).
        companion_layers: layers for these: "last", "late" (the last quarter) or "all".
        batch_size: sequences in a forward pass; halved permanently when memory runs out.
        memory_budget: memory that a measurement may use in addition to the model and its forward pass, in bytes or as
            text such as "8GiB" or "500 MB". If needed, layers are measured in groups, with one pass for each group.
            None: all layers at once, and in groups after memory has run out (docs/memory.md).
        forward: callable(model, input_ids [B, S], attention_mask [B, S]) that runs the model, for models whose
            own call differs.
        progress: whether to show a bar when a measurement takes more than two seconds.
        feature_probes: further probes. Only their labels are measured, with all other settings as given here, at
            positions with as many tokens on both sides as in the main probe. A feature has the name of its label.
            With a mapping `{name: probe}` it is `name_label`, unless both are the same.
        process_group: the ranks of `torch.distributed` that share each measurement; None: all ranks. Each of them
            calls `measure`, runs its part of the batches, adds up some of the layers, and returns the same point.
            "alone": this process measures by itself, for programs in which only one rank calls `measure`; not for
            sharded models.
        standard_errors: whether to estimate standard errors by leaving out groups of sequences in turn; True for 16
            groups, or their number. Batches then never cross a group. Needs memory for shares of labels (see
            `preflight`).
        loss: whether to measure the next-token loss on the probe, with the model's own head and in the same pass. True:
            on pairs of neighbouring real tokens. If the head would cost more than a tenth of the forward pass of the
            rest of the model, the pairs are thinned evenly, but not to fewer than 8,192. `"all"`: on all pairs. The
            measured loss is None for a model that does not predict the next token; `settings["loss"]` says why.
        readout: whether to measure `Measurement.readout`: the last layer's states after the final norm, with the
            model's own output embeddings of the probe's 100 most frequent tokens as reference points. The mean state
            and the mean embedding are removed. States are held until their mean is known.
        prediction: whether to measure `Measurement.prediction`: the model's next-token distributions, grouped into the
            probe's 99 most frequent tokens and the rest, in place of soft assignments. They are computed in the same
            way as the loss, at up to 8,192 valid positions. None: the same as `loss`.

    Raises:
        TypeError, ValueError: a setting is invalid or contradicts the preset; the message says what was expected.
    """

    @takes_presets
    def __init__(
        self,
        probe: Probe,
        *,
        preset: str | None = None,
        orders: str | Iterable[str] = ("token", "bigram", "trigram", "quadgram"),
        primary: str | None = None,
        features: str | Iterable[str] | None = None,
        layers: Layers = "hidden_states",
        num_bins: int = 100,
        temperature: float | str = "calibrated",
        seed: int = 0,
        weighting: str = "empirical",
        bound: str = "diagonal",
        null: bool = True,
        baseline: bool | str = True,
        baseline_offset: int | str | None = None,
        draws: int = 1,
        center: bool = False,
        last_block: bool = False,
        companions: str | Iterable[str] = (),
        companion_layers: str = "last",
        batch_size: int = 8,
        memory_budget: int | str | None = None,
        forward: Forward | None = None,
        progress: bool = False,
        feature_probes: FeatureProbes = (),
        process_group: Any = None,
        standard_errors: bool | int = False,
        loss: bool | str = True,
        readout: bool = True,
        prediction: bool | None = None,
    ) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(f"probe: expected an ib_callback.Probe, got {type(probe).__name__}. See Probe.from_texts.")
        self.probe = probe
        self.preset = preset
        self.orders = parse_orders(orders)
        self.primary = choose_primary(primary, self.orders)
        self.features = choose_features(features, probe, self.orders)
        self.layers = choose_layers(layers)
        self.num_bins = check_integer("num_bins", num_bins, minimum=2, cure="100 is the published choice")
        self.temperature = check_temperature(temperature)
        self.seed = check_seed(seed)
        check_weighting(weighting)
        self.weighting = weighting
        self.bound = choose_bound(bound, weighting)
        # Nulls and the ceiling are not defined for uniform weights.
        self.null = bool(null) and weighting == "empirical"
        self.baseline = choose_baseline(baseline, baseline_offset, weighting)
        each = 2 if self.baseline is None else 3 if self.baseline.shift == "circular" else 5
        least = each * len(self.orders) + len(self.features)
        if least > MAX_LABEL_SETS:
            raise ValueError(
                f"orders, features: expected at most {MAX_LABEL_SETS} label sets, got at least {least}. An order makes "
                "two, the document baseline one to three, a feature one. Measure fewer, or pass baseline=False."
            )
        self.draws = check_integer("draws", draws, minimum=1, cure="1 is the default")
        self.center = bool(center)
        self.last_block = bool(last_block)
        if last_block and self.layers != "hidden_states":
            raise ValueError(
                'last_block: expected layers="hidden_states", where the last layer follows the final norm, got '
                f"{layers!r}. "
                "Leave it out."
            )
        self.companions, self.companion_layers = choose_companions(companions, companion_layers)
        self.batch_size = check_integer("batch_size", batch_size, minimum=1, cure="8 is the default")
        self.memory_budget = (
            None if memory_budget is None else check_bytes("memory_budget", memory_budget, cure="None sets no limit")
        )
        if forward is not None and not callable(forward):
            raise TypeError(f"forward: expected callable(model, input_ids, attention_mask), got {forward!r}.")
        self.forward = forward
        self.progress = bool(progress)
        self.process_group = choose_process_group(process_group)
        self.standard_errors = choose_groups(standard_errors, weighting)
        self.loss = choose_loss(loss)
        self.readout = bool(readout)
        self.prediction = bool(self.loss) if prediction is None else bool(prediction)
        self._plans: dict[int, Plan] = {}
        self._predicted_plans: dict[int, Plan] = {}
        self._distributions: Distributions | None = None
        self._curve: IBCurve | None = None
        self._quantiser = Quantiser(self.num_bins, self.temperature, self.seed, self.draws)
        self._autocast = ""  # set at the first forward pass
        self._planes = True
        self._refused: tuple[int, str] | None = None  # a model by its id, and why
        self._told_equal: set[str] = set()  # names of layers with equal states
        self._read_ahead: dict[str, bool] = {}  # by the name of each kind of model that has been checked
        self._cross_checked: set[tuple[str, ...]] = set()  # the same name, with the names of the layers
        self._routes = Routes()
        self._told: set[str] = set()
        self._at_once: int | None = None  # layers, and where histograms are: set after memory has run out
        self._on_host = False
        self._short = False  # whether memory has run out
        self._further = [
            (self._for_features(other), names)
            for other, names in named_features(feature_probes, self.orders, self.features)
        ]

    def _for_features(self, probe: Probe) -> Meter:
        """A meter with the same settings that measures only the features of another probe, no orders."""
        other = copy.copy(self)
        other.probe, other.features = probe, tuple(probe.labels)
        other._planes, other._plans, other._further, other.loss = False, {}, [], False
        other.readout, other.prediction = False, False
        other.draws, other.center, other.last_block, other.companions = 1, False, False, ()
        other._quantiser = Quantiser(self.num_bins, self.temperature, self.seed)
        return other

    def _further_meters(self) -> list[Meter]:
        """The meters of the feature probes, with this meter's present settings, which callbacks set for each run."""
        for meter, _ in self._further:
            meter.layers, meter.forward, meter.progress = self.layers, self.forward, self.progress
        return [meter for meter, _ in self._further]

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The main probe and the feature probes."""
        return (self.probe, *(meter.probe for meter, _ in self._further))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of all measured features, including those of `feature_probes`."""
        return (*self.features, *(name for _, names in self._further for name in names.values()))

    @property
    def view_names(self) -> tuple[str, ...]:
        """Names of the views of a measurement (measuring/views.py)."""
        aimed = {"readout": self.readout, "prediction": self.prediction}
        return (*self._views(1).others, *(name for name, wanted in aimed.items() if wanted))

    @property
    def unmeasured(self) -> list[str]:
        """Quantities (results/metrics.py) that these settings and this probe leave out for every model."""
        of_null = ["complexity_null", "expressivity_null", "complexity_null_se", "expressivity_null_se"]
        of_null += ["information_null", "information_null_std", "information_p_value"]
        found = [] if self.null else of_null
        found += ["ceiling"] if self.weighting != "empirical" else []
        if not self._has_baseline():
            found += [f"{side}_{kind}" for side in ("complexity", "expressivity") for kind in ("baseline", "local")]
        if not self.loss:
            found += ["loss", "loss_se", "bits_per_byte", "predictive_information"]
        return found if self.probe.num_bytes else [*found, "bits_per_byte"]

    def _has_baseline(self) -> bool:
        if self.baseline is None:
            return False
        mask, width = self.probe.attention_mask.numpy(), max(self.orders.values())
        try:
            return has_baseline(valid_positions(mask, width), self.baseline)
        except ProbeError:  # no position is valid; making the plan reports this
            return True

    def _views(self, num_layers: int) -> Views:
        return Views(num_layers, draws=self.draws, center=self.center, last_block=self.last_block)

    def plan(self) -> Plan:
        """The plan for the present batch size, made on first use. Raises a ProbeError if no position is valid."""
        if self.batch_size not in self._plans:
            if self.preset is not None and self._planes:
                tell_of_size(self.preset, self.probe)
            self._plans = {self.batch_size: self._make_plan(self.features)}
        return self._plans[self.batch_size]

    def _predicted_plan(self) -> Plan:
        """The plan for the positions at which next-token distributions are measured."""
        if self.batch_size not in self._predicted_plans:
            self._predicted_plans = {self.batch_size: self._make_plan((), predicted=True)}
        return self._predicted_plans[self.batch_size]

    def _make_plan(self, features: tuple[str, ...], *, predicted: bool = False) -> Plan:
        return make_plan(
            self.probe,
            self.orders,
            features,
            batch_size=self.batch_size,
            null=self.null,
            seed=self.seed,
            baseline=self.baseline,
            planes=self._planes,
            num_groups=self.standard_errors,
            predicted=predicted,
        )

    def prediction_positions(self) -> Positions:
        """Where next-token distributions are measured: `sequence` [P] and `offset` [P], the same for every model."""
        valid = valid_positions(self.probe.attention_mask.numpy(), max(self.orders.values()), probe=self.probe.name)
        return positions_for_prediction(self.probe, valid, self.seed)

    def curve(self) -> IBCurve | None:
        """The IB curve used as the bound, in nats, computed on first use; None if the bound is the diagonal."""
        if self.bound == "ib_curve" and self._curve is None:
            self._curve = probe_curve(
                self.probe,
                order=self.primary,
                orders=self.orders,
                num_codewords=self.num_bins,
                progress=self.progress,
            )
        return self._curve

    def preflight(self, model: nn.Module) -> Preflight:
        """Check everything that can be checked before training: blocks, vocabulary, positions, memory, one forward.

        Raises:
            ModelError: blocks were not found, token ids or lengths exceed the model's, or the forward pass changes
                parameters.
            ProbeError: there is no valid position, or `memory_budget` is too small.
            RepresentationError: the model's states are zero, NaN or inf.
        """
        root = access.unwrap(model)
        self._refused = None
        team = self._join(root)
        kept = Kept()
        found = kept(lambda: self._preflight(model, root, team))
        team.ranks.agree_on(kept, at_end=True)
        assert found is not None
        return found

    def _preflight(self, model: nn.Module, root: nn.Module, team: Team) -> Preflight:
        layers = self._layers(root)
        plan = self.plan()
        readout = self._readout(root, plan, team, len(layers)) if self.readout else None
        need = self._need(plan, root, readout, team.ranks.size, team.num_crews)
        groups = self._groups(root, plan, self._captured(root, layers), team)
        memory = need.of(layers_of_rank(len(groups[0]), team.ranks.size))
        _warn_if_short(access.device_of(root), memory)
        with unchanged_parameters(root, copied=True), untouched(root), resharded(root):
            team.ranks.agree(None)  # as in a measurement
            forward = self._forward(root, team)

            def try_out() -> None:
                with (
                    self._told_which_layers(forward, layers),
                    self._check_norm(root, layers),
                    nullcontext() if readout is None else readout,
                ):
                    forward.once(forward.longest(plan.batches), layers)
                self._check_layers(forward, layers, called=True)
                self._warn_if_bidirectional(forward, layers)

            kept = Kept()
            with self._known_to_all():
                kept(try_out)
                team.ranks.agree_on(kept)
            self._autocast = forward.autocast
            route = self._find_route(root, team) if self.loss or self.prediction else Route("none")
        missing = {} if readout is None or not readout.why else {"readout": readout.why}
        if route.kind == "none" and self.prediction:
            missing["prediction"] = route.why
        self.curve()
        for feature in (each.labels for each in plan.quantities if isinstance(each, Feature)):
            if few := too_few_pairs(feature):
                warn(f"feature {feature.name!r} of probe {self.probe.name!r}: {few}.")
        return Preflight(
            layers=tuple(layer.name for layer in layers),
            num_sequences=len(self.probe),
            num_positions=plan.num_positions,
            memory=memory,
            passes=len(groups) + self.center,
            feature_probes=tuple((meter.probe.name, meter.preflight(model)) for meter in self._further_meters()),
            missing=missing,
            num_positions_local=next(
                (each.num_positions for each in plan.quantities if isinstance(each, Documents)), None
            ),
        )

    def plan_summary(
        self, model: nn.Module | None = None, *, num_layers: int | None = None, num_ranks: int = 1
    ) -> PlanSummary:
        """What a measurement will need: labels, memory by part, passes and predicted seconds; `str()` makes it a text.

        Seconds are estimated on this machine: the meter adds up batches of a small part of the probe, and runs one
        batch through the model, if given. Ranks are assumed to share forward passes and layers equally.

        Args:
            model: the model to measure; it decides the number of layers.
            num_layers: number of layers, if no model is given; forward passes are not predicted then.
            num_ranks: number of ranks that share a measurement, as in data-parallel training.

        Raises:
            ModelError, ProbeError: as for `preflight`; also if `memory_budget` is too small.
            ValueError: neither a model nor a number of layers is given, or both.
        """
        if (model is None) == (num_layers is None):
            raise ValueError("plan_summary: expected either a model or num_layers=, such as num_layers=32.")
        check_integer("num_ranks", num_ranks, minimum=1, cure="1 means one process")
        root = None if model is None else access.unwrap(model)
        if root is None:
            number = check_integer("num_layers", num_layers, minimum=1, cure="a model of 7B has 32")
            device, readout = torch.device("cpu"), None
        else:
            number, device = len(self._captured(root, self._layers(root))), access.device_of(root)
            readout = self._readout(root, self.plan(), Team.alone(), number) if self.readout else None
        plan = self.plan()
        need = self._need(plan, root, readout, num_ranks, num_ranks)
        own = layers_of_rank(number, num_ranks)
        at_once = min(own, self._at_once or own)
        if self.memory_budget is not None:
            at_once = need.layers_within(self.memory_budget, at_once, probe=self.probe.name)
        variants = self._views(1).num_variants
        parts = plan.memory_by_part(at_once * variants, self.num_bins)
        if num_ranks > 1:  # assignments of all layers, the parts of them that are sent, and as much that is received
            together = min(number, at_once * num_ranks) * variants
            parts["assignments"] = 3 * plan.memory_by_part(together, self.num_bins)["assignments"]
        of_plan = bytes_of([plan, self._predicted_plan() if self.prediction else None])
        parts |= {"plan": of_plan, "views": max(0, need.beside - of_plan)}
        passes = math.ceil(own / at_once)
        singletons = sum(
            round(float(each.share[each.count == 1].sum()) * label_set.num_positions)
            for each, label_set in zip(plan.counts, plan.label_sets, strict=True)
        )
        forward = None if root is None else self._seconds_of_a_forward(root, plan) * len(plan.batches)
        return PlanSummary(
            num_sequences=len(self.probe),
            num_positions=plan.num_positions,
            num_layers=number,
            num_ranks=num_ranks,
            labels=sum(label_set.num_labels for label_set in plan.label_sets),
            singletons=singletons,
            slots=plan.num_slots,
            bytes_by_part=parts,
            passes=passes + self.center,
            seconds_adding=own * variants * plan.num_positions * self._seconds_of_adding(device),
            seconds_forward=None if forward is None else forward * (passes + self.center) / num_ranks,
        )

    def _seconds_of_adding(self, device: torch.device) -> float:
        """Seconds for each position and layer, from the first batches of the probe."""
        part = self.probe.input_ids[: 4 * self.batch_size], self.probe.attention_mask[: 4 * self.batch_size]
        few = copy.copy(self)
        few.probe, few.features, few._plans, few.standard_errors = Probe.from_tokens(*part), (), {}, 0
        plan = few.plan()
        table = torch.rand(max(len(batch.positions) for batch in plan.batches), 4, self.num_bins, device=device)
        accumulator = Accumulator(plan, 4, self.num_bins, weighting=self.weighting, device=device)
        started = time.perf_counter()
        for batch in plan.batches:
            accumulator.add(batch, table[: len(batch.positions)])
        accumulator.sums()  # waits for the device
        return (time.perf_counter() - started) / (4 * plan.num_positions)

    def _seconds_of_a_forward(self, root: nn.Module, plan: Plan) -> float:
        """Seconds for the first batch, after the model has run it once."""
        batch, times = plan.batches[0], []
        with self._visit(root):
            for _ in range(2):
                started = time.perf_counter()
                self._forward(root).alone(torch.arange(batch.sequences.start, batch.sequences.stop), batch.width)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        return times[-1]

    def measure(self, model: nn.Module, *, step: int | None = None) -> Measurement:
        """Measure `model` as it is.

        When memory runs out, the meter tries again with smaller settings and keeps them: fewer layers at a time if its
        own work needs too much memory, smaller batches if the model's forward pass does (docs/memory.md).

        Args:
            model: in any mode, on any device, wrapped for data parallelism or compiled.
            step: number of optimizer steps taken so far, for the record.

        Raises:
            ModelError, ProbeError: as for `preflight`. If a forward pass changed parameters, the model is not run
                again.
            RepresentationError: zero vectors, NaN or inf at valid positions.
            torch.OutOfMemoryError: even one layer of one sequence at a time does not fit.

        Returns:
            The measured point, with information in fractions of log(num_bins), as Conklin et al. (ICLR 2026) plot it.
        """
        if step is not None:
            check_integer("step", step, minimum=0, cure="None means a model outside training")
        root = access.unwrap(model)
        team = self._join(root)
        started = time.perf_counter()
        kept = Kept()
        found = kept(lambda: self._found(root, team))
        team.ranks.agree_on(kept, at_end=True)
        assert found is not None
        by_rank = team.ranks.to_first(found.sums)
        read = partial(self._read, root, team, found, by_rank, step, started)
        point = kept(read) if team.ranks.is_first else None
        team.ranks.agree_on(kept)
        point = team.ranks.of_first(point)
        assert point is not None
        self._tell_of_equal_states(point)
        return point

    def _found(self, root: nn.Module, team: Team) -> _Found:
        """The result of this rank's part of the passes.

        Errors are raised only before an agreement of all ranks, or after the last one.
        """
        further = self._further_meters()
        layers = self._layers(root)
        kept = Kept()
        with self._visit(root):
            team.ranks.agree(None)  # before the first forward, which ranks may make together
            if self.forward is None:
                with self._known_to_all():
                    kept(partial(self._look_at, root, layers, team))
                    team.ranks.agree_on(kept)
            route = self._route(root, team)
            losses = kept(partial(self._loss_pass, root, route))
            team.ranks.agree_on(kept)
            with self._check_norm(root, layers):
                of_main = self._sums(root, self._captured(root, layers), team, losses)
            others = [meter._sums(root, layers, team) for meter in further]
        outcome = None if losses is None else self._routes.note(root, self._told_of(losses.outcome()))
        sums = ([of_main.parts, *(other.parts for other in others)], {k: v.sums for k, v in of_main.aimed.items()})
        return _Found(layers, [of_main, *others], losses, outcome, sums)

    def _look_at(self, root: nn.Module, layers: list[Layer], team: Team) -> None:
        self._check_layers(self._forward(root, team), layers)
        self._warn_if_bidirectional(self._forward(root, team), layers)

    @contextmanager
    def _known_to_all(self) -> Iterator[None]:
        """Undo what was learned about models if an error is raised, because later forwards of ranks would differ."""
        known = self._read_ahead.copy(), self._cross_checked.copy()
        try:
            yield
        except Exception:
            self._read_ahead, self._cross_checked = known
            raise

    def _read(
        self, root: nn.Module, team: Team, found: _Found, by_rank: list[_Parts], step: int | None, started: float
    ) -> Measurement:
        """Make the point from the results of all ranks."""
        layers, main = found.layers, found.passes[0]
        views = self._views(len(layers))
        sums = [
            _joined([parts[number] for parts, _ in by_rank], each, team, views.num_variants if number == 0 else 1)
            for number, each in enumerate(found.passes)
        ]
        aimed = {
            name: replace(each, sums=next((own[name] for _, own in by_rank if own[name] is not None), None))
            for name, each in main.aimed.items()
        }
        moments = main.moments
        dispersion = [part.dispersion(index) for part in moments for index in range(len(part.unit))]
        settings = self.settings(root)
        if found.loss is not None and self.loss:
            settings["loss"]["path"] = str(found.loss)
        settings |= {name: each.told for name, each in aimed.items()}
        curve = self.curve()
        measurement = read_out(
            main.plan,
            sums[0],
            step=step,
            layers=[layer.name for layer in layers],
            weighting=self.weighting,
            primary=self.primary,
            settings=settings,
            seconds=time.perf_counter() - started,
            others=[
                (names, other.plan, each)
                for (_, names), other, each in zip(self._further, found.passes[1:], sums[1:], strict=True)
            ],
            curve=None if curve is None else curve.to_efficiency(self.num_bins),
            views=views,
            dispersion=dispersion[: len(layers)],
            companions=self._companions(layers, moments),
            aimed={
                name: (each.plan, each.sums, self._curve_of(main.plan, each))
                for name, each in aimed.items()
                if each.sums is not None
            },
        )
        if found.losses is None or not self.loss:
            return measurement
        bounds = None if main.plan.jackknife is None else main.plan.jackknife.sequence_bounds
        return replace(measurement, **loss_numbers(found.losses, self.probe, bounds))

    def _join(self, root: nn.Module) -> Team:
        """The ranks that share the measurement, after checking that all of them make the same one."""
        ranks = Ranks.alone() if self.process_group == "alone" else Ranks(self.process_group)
        meters = (self, *self._further_meters())

        def look() -> None:
            self._check_not_refused(root)
            if ranks.is_first:
                self.curve()
            for meter in meters:
                meter.probe.verify()
                meter._layers(root)

        if ranks.size == 1:
            look()
            return Team.alone()
        kept = Kept()
        kept(look)
        mine = None if kept.error is not None else kept(lambda: (self._agreed_settings(root), parallelism(root)))
        with ranks.awaited('a measurement, which all ranks make together (process_group="alone" measures on one rank)'):
            ranks.agree_on(kept)
        every = [each for each in ranks.of_every(mine) if each is not None]
        _check_alike([settings for settings, _ in every])
        in_step = any(how.is_sharded for _, how in every)
        for meter in meters:
            meter._plan_with(ranks)
        return Team(ranks, crews_of([how.together for _, how in every], ranks.numbers()), in_step=in_step)

    def _plan_with(self, ranks: Ranks) -> None:
        """Make the plan for the present batch size on one rank of each machine; the others map its file."""
        if not any(ranks.of_every(self.batch_size not in self._plans)):
            return
        machines = ranks.of_every(this_machine())
        planner = machines.index(machines[ranks.rank])
        kept = Kept()
        with ExitStack() as files:
            path: Path | None = None
            if ranks.rank == planner:
                plan = kept(self.plan)
                if plan is not None and machines.count(machines[planner]) > 1:
                    path = kept(partial(_in_file, plan, files))
            ranks.agree_on(kept)
            paths = ranks.of_every(path)
            if ranks.rank != planner:
                kept(lambda: self._take_plan(paths[planner]))
            ranks.agree_on(kept)  # all ranks have read the file before it is removed

    def _take_plan(self, path: Path | None) -> None:
        """Take the plan from the file of another process of this machine; make one if the file cannot be read."""
        try:
            if path is not None:
                self._plans = {self.batch_size: read_plan(path)}
        except (OSError, ValueError):  # for example, if processes of a machine do not see each other's files
            pass
        self.plan()

    def _agreed_settings(self, root: nn.Module) -> dict[str, str]:
        """Settings that must be equal on all ranks that share a measurement, by name, as texts to compare."""
        settings = {k: v for k, v in self.settings(root).items() if k not in ("dtype", "loss")}
        settings |= {"batch_size": self.batch_size, "memory_budget": self.memory_budget, "loss": self.loss}
        settings |= {"readout": self.readout, "prediction": self.prediction, "null": self.null}
        settings |= {"baseline": str(self.baseline), "standard_errors": self.standard_errors}
        settings["probe"] = [probe.fingerprint for probe in self.probes]
        return {name: repr(value) for name, value in settings.items()}

    def _curve_of(self, plan: Plan, outcome: Outcome) -> IBCurve | None:
        """The curve in efficiencies for the assignments of a codebook.

        None if it does not bound them: it needs all positions, and no more bins.
        """
        fits = outcome.num_bins <= self.num_bins and outcome.plan.num_positions == plan.num_positions
        return self._curve.to_efficiency(outcome.num_bins) if self._curve is not None and fits else None

    def _find_route(self, root: nn.Module, team: Team) -> Route:
        """Find out how the loss of the model can be computed."""
        known = self._read_ahead.get(_kind_of(root))
        route = reads_ahead(root) if known else find_route(root, self.probe, self.forward, team)
        every = team.ranks.of_every(route)
        return self._routes.note(root, self._told_of(next((each for each in every if each.is_failure), every[0])))

    def _route(self, root: nn.Module, team: Team) -> Route | None:
        """The route (the way to the loss) of a measurement; None if neither losses nor distributions are measured."""
        return (self._routes.get(root) or self._find_route(root, team)) if self.loss or self.prediction else None

    def _loss_pass(self, root: nn.Module, route: Route | None) -> LossPass | None:
        """The object that adds up the losses of a pass and makes distributions; None if neither is measured."""
        if route is None:
            return None
        number = number_of_pairs(self.probe, root, every=self.loss == "all") if self.loss else 0
        pairs = pairs_for_loss(self.probe, number, self.seed)
        if self.prediction and self._distributions is None:  # made once: it depends on the probe, and sorts it
            tokens = frequent_tokens(self.probe, NUMBER - 1)
            self._distributions = Distributions(self.prediction_positions(), tokens)
        return LossPass(root, self.probe, pairs, route, self._distributions)

    def _told_of(self, route: Route) -> Route:
        """Return the route; if it failed, warn once."""
        # If only distributions are measured, the view itself reports the failure.
        if self.loss and route.is_failure and route.why not in self._told:
            self._told.add(route.why)
            warn(f"the next-token loss on the probe could not be measured: {route.why}.", stacklevel=4)
        return route

    def _tell_of_equal_states(self, measurement: Measurement) -> None:
        """Warn once for each layer whose states are all equal."""
        complexities = measurement[self.primary].complexity_by_layer
        equal = [name for name, value in zip(measurement.layers, complexities, strict=True) if value == 0]
        if self._told_equal.issuperset(equal):
            return
        self._told_equal.update(equal)
        where, undefined = ", ".join(map(repr, equal)), ""
        if len(equal) == len(complexities):
            where, undefined = "all layers", ", and optimality and other ratios to it are undefined"
        warn(
            f"the hidden states of {where} nearly coincide at all positions. What they say about the tokens is smaller "
            f"than the rounding error of the sums, so complexity is given as 0 there{undefined}. Perhaps the model is "
            "dead or has collapsed, or the probe has one token only. Otherwise measure other layers with layers=."
        )

    def assignments(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the soft assignments that a measurement of `model` adds up, layer by layer, for your own analysis.

        `memory_budget` (by default 1 GiB) decides how many passes this takes. For the positions and labels of the
        assignments, call `ngram_labels` with `widest=` the widest order of this meter.

        Yields:
            Name of the layer and [T, num_bins], float32, on the CPU, for the valid positions in the order of the probe.

        Raises:
            ModelError, ProbeError, RepresentationError: as for `measure`.
        """
        root = access.unwrap(model)
        self.probe.verify()
        layers = self._layers(root)
        plan = self.plan()
        each = 4 * plan.num_positions * self.num_bins
        size = max(1, (self.memory_budget or _ASSIGNMENTS_MEMORY) // each)
        for group in (layers[i : i + size] for i in range(0, len(layers), size)):
            table = self._table(root, plan, group, of=layers)
            for index, layer in enumerate(group):
                yield layer.name, table[:, index]

    def _table(self, root: nn.Module, plan: Plan, layers: list[Layer], of: list[Layer]) -> Tensor:
        """Assignments [T, L, num_bins] of `layers`, some of the layers `of`, on the CPU.

        They are those of all valid positions in the order of the probe.
        """
        parts: list[Tensor] = []

        def keep(_: Round[Batch], assignments: Tensor | None) -> None:
            # Copied, because the next batch overwrites them. With several draws, the first one is used.
            assert assignments is not None
            parts.append(assignments[:, : len(layers)].to("cpu", copy=True))

        with self._visit(root):
            self._check_layers(self._forward(root), of)
            rounds = self._bar(Team.alone(), plan)
            self._forward(root).over(rounds, layers, keep, Kept())
        return torch.cat(parts)

    @contextmanager
    def _visit(self, root: nn.Module) -> Iterator[None]:
        """Check that the body does not change the model; if it does, the model is not measured again."""
        self._check_not_refused(root)
        try:
            with unchanged_parameters(root), untouched(root), resharded(root):
                yield
        except ChangedParametersError as error:
            if not is_sharded(root):  # with a sharded model, a rank that refused would keep the others waiting
                self._refused = (id(root), str(error))
            raise

    def _check_not_refused(self, root: nn.Module) -> None:
        if self._refused is not None and self._refused[0] == id(root):
            raise ModelError(
                "an earlier measurement changed the weights of the model, so it is not measured again: "
                f"{self._refused[1]}"
            )

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Everything that decides whether two measurements can be compared, as JSON values."""
        root = access.unwrap(model)
        probes = [(self.probe, {name: name for name in self.features})]
        probes += [(meter.probe, names) for meter, names in self._further]
        optional: dict[str, Any] = {
            "documents": self.probe.source.get("documents"),
            "feature_probes": {name: probe.fingerprint for probe, names in probes[1:] for name in names.values()},
            "groups": {
                probe.name: hashlib.sha256(json.dumps(probe.groups).encode()).hexdigest()[:16]
                for probe, _ in probes
                if probe.groups is not None
            },
            "label_names": {name: texts for pair in probes for name, texts in label_names(*pair).items()},
        }
        optional |= {"draws": self.draws} if self.draws > 1 else {}
        if self.baseline is not None and self.baseline.shift != "circular":
            optional |= {"baseline": self.baseline.shift, "baseline_offset": self.baseline.offset}
        optional |= {"center": self.center, "last_block": self.last_block}
        optional |= {f"companions/{self.companion_layers}": list(self.companions)} if self.companions else {}
        codewords = {"bound_codewords": self.num_bins} if self.bound == "ib_curve" else {}
        if self.loss:
            route = self._routes.get(root)
            known = {} if route is None else {"path": str(route)}
            impossible = route is not None and route.kind == "none"
            positions = None if impossible else number_of_pairs(self.probe, root, every=self.loss == "all")
            optional["loss"] = known | {"positions": positions}
        return {
            "probe": self.probe.fingerprint,
            "K": max(self.orders.values()),
            "orders": list(self.orders),
            "primary": self.primary,
            "features": list(self.features),
            "layers": [layer.name for layer in access.resolve_layers(root, self.layers)],
            "num_bins": self.num_bins,
            "temperature": self.temperature,
            "seed": self.seed,
            "weighting": self.weighting,
            "bound": self.bound,
            **codewords,
            "dtype": access.dtype_of(root) + self._autocast,
            "version": __version__,
            **{name: value for name, value in optional.items() if value},
        }

    def _layers(self, root: nn.Module) -> list[Layer]:
        """The layers to measure, after checking that the model can be measured and that the probe fits it."""
        if refusal := parallelism(root).refusal:
            raise ModelError(refusal)
        if self.forward is None:
            access.refuse_encoder_decoder(root)
        try:
            layers = access.resolve_layers(root, self.layers)
        except ModelError as error:
            raise ModelError(f"{error}{self._suggestion(root)}") from None
        check_fit(root, self.probe)
        return layers

    def _suggestion(self, root: nn.Module) -> str:
        """What to pass as layers= for a model whose layers were not found."""
        if self.layers != "hidden_states" or self.forward is not None:
            return ""
        check_fit(root, self.probe)
        told = ""

        def ask() -> None:
            nonlocal told
            with self._visit(root):
                told = crosscheck.suggestion(self._forward(root), self.plan().batches)

        accident(ask)
        return told

    def _captured(self, root: nn.Module, layers: list[Layer]) -> list[Layer]:
        """The layers, and the last block before the final norm if it is measured."""
        return [*layers, access.resolve_layers(root, "blocks")[-1]] if self.last_block else layers

    def _companions(self, layers: list[Layer], moments: list[Moments]) -> dict[str, dict[str, float]]:
        """Comparison measures by name and layer."""
        found: dict[str, dict[str, float]] = {name: {} for name in self.companions}
        start = 0
        for part in moments:
            for index, second in part.second.items():
                for name, values in found.items():
                    value = COMPANIONS[name](part.first[index], second, part.count)
                    values[layers[start + index].name] = value
            start += len(part.unit)
        return found

    def _accompanied(self, num_layers: int) -> list[int]:
        """Numbers of the layers for which comparison measures are computed."""
        if not self.companions:
            return []
        views = self._views(num_layers).layers
        return list(range(num_layers)) if self.companion_layers == "all" else views[self.companion_layers]

    def _forward(self, root: nn.Module, team: Team | None = None, losses: LossPass | None = None) -> ProbeForward:
        return ProbeForward(root, self.probe, self._quantiser, self.forward, losses, team)

    def _need(
        self, plan: Plan, root: nn.Module | None, readout: Readout | None, num_ranks: int, num_crews: int
    ) -> Need:
        """Bytes that a measurement needs on one rank, on the device that holds the histograms.

        Without a model, only the part that does not depend on it.
        """
        predicted = self._predicted_plan() if self.prediction else None
        beside = 0 if predicted is None else predicted.memory(1, NUMBER)
        own = plan.memory(1, NUMBER) if self.readout else 0
        waiting = 0 if readout is None else readout.waiting()
        if self._on_host or root is None or access.device_of(root).type == "cpu":
            beside += waiting + bytes_of([plan, predicted])
        elif self._states_may_wait_there():
            beside += waiting
        if root is not None and self.companions:
            # Second moments, and the product that is added to them.
            number = len(self._accompanied(len(self._layers(root))))
            beside += 8 * (number + 1) * dim_of(head.output_head(root)) ** 2
        # States that are held for their mean are added up after the layers; others at once.
        after = beside + own if waiting else 0
        beside += 0 if waiting else own
        # Inside one layer's hook: logits and assignments of all tokens of a batch.
        tokens = max((batch.sequences.stop - batch.sequences.start) * batch.width for batch in plan.batches)
        moment = max(8 * self.num_bins * tokens, 0 if root is None else self._logits(root, tokens))
        parts = plan.memory_by_part(self._views(1).num_variants, self.num_bins)
        # For each of its layers, a rank also holds the assignments of all ranks' layers in its batch, and the buffers
        # of the exchange.
        tables = num_ranks + 2 * num_crews - 1 if num_ranks > 1 else 0
        each = sum(parts.values()) + tables * parts["assignments"]
        return Need(each, beside, after, parts["scratch"], moment)

    def _logits(self, root: nn.Module, tokens: int) -> int:
        """Bytes of the logits for losses and distributions of this many tokens.

        They include the logits of the step before, the logarithms, and the results.
        """
        if not (self.loss or self.prediction):
            return 0
        number = number_of_pairs(self.probe, root, every=self.loss == "all") if self.loss else POSITIONS
        looked_at = math.ceil(tokens * min(1.0, number / max(1, int(self.probe.attention_mask.sum()))))
        rows = min(rows_at_a_time(root, access.device_of(root)), looked_at)
        return 16 * rows * (access.vocabulary_size(root) or 0)

    def _groups(self, root: nn.Module, plan: Plan, layers: list[Layer], team: Team) -> list[list[Layer]]:
        """Cut the layers into groups that fit each rank's memory budget, and the memory that proved to be available."""
        size = self._at_once or len(layers)
        if self.memory_budget is not None:
            readout = self._readout(root, plan, team, len(layers)) if self.readout else None
            need = self._need(plan, root, readout, team.ranks.size, team.num_crews)
            most = layers_of_rank(len(layers), team.ranks.size)
            of_rank = need.layers_within(self.memory_budget, most, probe=self.probe.name)
            size = min(size, of_rank * team.ranks.size)
        return [layers[i : i + size] for i in range(0, len(layers), size)]

    def _sums(self, root: nn.Module, layers: list[Layer], team: Team, losses: LossPass | None = None) -> _Passes:
        """The result of whole passes, on every rank its part; with smaller batches if memory runs out."""
        while True:
            try:
                return self._passes(root, layers, team, losses)
            except RanksError:  # even if its cause was a lack of memory, because the others are inside the forward
                raise
            except RepresentationError as error:
                if self._planes:
                    raise
                # The main probe may be fine.
                of_probe: Any = RepresentationError(f"feature probe {self.probe.name!r}: {error}")
                of_probe.of_all_ranks = True
                raise of_probe from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                means = self._cheaper(root, layers, team, of_measuring=is_of_measuring(error))
                if means is None:
                    raise
            # Outside the except block, where the traceback no longer holds the tensors of the failed pass.
            let_go()
            self.batch_size, self._at_once, self._on_host = means.batch_size, means.layers, means.on_host
            self._short = True
            warn(
                f"out of memory while measuring. Trying again with {means.describe()}. This also holds from now on.",
                stacklevel=3,
            )

    def _cheaper(self, root: nn.Module, layers: list[Layer], team: Team, *, of_measuring: bool) -> Means | None:
        """What to try next after memory ran out, the same on all ranks; None if nothing is left to try."""
        means = Means(self.batch_size, self._at_once, self._on_host)
        plan = self.plan()
        at_once = len(self._groups(root, plan, layers, team)[0])
        host_layers = self._host_layers(root, plan, len(layers))
        found = cheaper(means, at_once, of_measuring=of_measuring, host_layers=host_layers)
        return team.ranks.of_first(found)  # because ranks may differ in free memory

    def _host_layers(self, root: nn.Module, plan: Plan, num_layers: int) -> int:
        """How many layers fit into the host's memory at a time; 0 if the model is on the host already."""
        if access.device_of(root).type == "cpu":
            return 0
        each = plan.memory(self._views(1).num_variants, self.num_bins)
        return max(1, min(num_layers, (free_memory(torch.device("cpu")) or 0) * 3 // 4 // each))

    def _accumulates_on(self, root: nn.Module) -> torch.device:
        """The device that holds the histograms."""
        return torch.device("cpu") if self._on_host else access.device_of(root)

    def _passes(self, root: nn.Module, layers: list[Layer], team: Team, losses: LossPass | None) -> _Passes:
        """Run `_sums` with the present batch size. Its memory is freed before a smaller batch is tried."""
        kept = Kept()
        if not team.is_alone:
            self._plan_with(team.ranks)
        plan = self.plan()
        centers = self._mean_states(root, plan, layers, team) if self.center else None
        accompanied = self._accompanied(len(layers) - self.last_block)
        groups = kept(lambda: self._groups(root, plan, layers, team))
        aimed = kept(lambda: self._aimed(root, plan, team, losses, len(groups[0]) if groups else 0))
        team.ranks.agree_on(kept)
        assert groups is not None
        assert aimed is not None
        parts, moments, start = [], [], 0
        for group in groups:
            stop = start + len(group)
            second = [number - start for number in accompanied if start <= number < stop]
            of_first = (None, {}) if start else (losses, aimed)
            sums, of_group = self._pass(root, plan, group, team, centers and centers[start:stop], second, *of_first)
            parts.append(sums)
            moments.append(of_group)
            trim()  # frees memory for the histograms of the next layers
            start = stop
        with own_work():
            outcomes = {name: codebook.outcome() for name, codebook in aimed.items()}
        of_loss = self.loss and losses is not None and losses.outcome().is_failure  # has its own warning
        for name, outcome in outcomes.items():
            if outcome.is_failure and not (name == "prediction" and of_loss):
                self._tell_of(name, outcome.why)
        return _Passes(plan, [len(group) for group in groups], parts, moments, outcomes)

    def _mean_states(self, root: nn.Module, plan: Plan, layers: list[Layer], team: Team) -> list[Tensor]:
        """The mean unit state [dim] of each layer, from a separate pass."""
        kept = Kept()
        moments = self._forward(root, team).moments(self._bar(team, plan), layers, kept)
        team.ranks.agree_on(kept)
        moments.share(team.peers)
        return [moments.mean(index).float() for index in range(len(layers))]

    def _pass(
        self,
        root: nn.Module,
        plan: Plan,
        layers: list[Layer],
        team: Team,
        centers: list[Tensor] | None,
        second: list[int],
        losses: LossPass | None,
        aimed: Mapping[str, Readout | Prediction],
    ) -> tuple[Sums | None, Moments]:
        """One pass over the probe for some of the layers, and for losses and codebooks if given."""
        if losses is not None:
            losses.begin()
        forward = self._forward(root, team, losses)
        columns = [
            [variant * len(layers) + layer for variant in range(self._views(1).num_variants) for layer in share]
            for share in team.shares(len(layers))
        ]
        device = self._accumulates_on(root)
        kept = Kept()
        make = partial(SharedAccumulator, plan, columns, self.num_bins, weighting=self.weighting, device=device)
        accumulator = kept(own_work()(partial(make, team=team, kept=kept)))
        team.ranks.agree_on(kept)
        assert accumulator is not None
        moments = Moments(len(layers), second)

        def use(batches: Round[Batch], assignments: Tensor | None) -> None:
            accumulator.add(batches, assignments)
            for codebook in aimed.values():
                codebook.take(batches, assignments is not None)

        with ExitStack() as hooks:
            for codebook in aimed.values():
                hooks.enter_context(codebook)
                codebook.look(forward.alone)
            forward.over(self._bar(team, plan), layers, use, kept, centers=centers, moments=moments)
        team.ranks.agree_on(kept)
        if losses is not None:
            losses.agree(team.ranks)
            forward.beside(plan.batches, self.batch_size, kept)
            team.ranks.agree_on(kept)
            losses.agree(team.ranks)
            losses.share(team.peers)
        moments.share(team.peers)
        self._autocast = forward.autocast
        sums = kept(own_work()(accumulator.sums))
        team.ranks.agree_on(kept)
        return sums, moments

    def _readout(self, root: nn.Module, plan: Plan, team: Team, num_layers: int) -> Readout:
        limit = min(KEPT, self.memory_budget or KEPT)
        device = torch.device("cpu") if self._on_host else None
        return Readout(
            root, plan, frequent_tokens(self.probe, NUMBER),
            weighting=self.weighting, limit=limit, team=team, num_layers=num_layers, device=device,
            may_wait_there=self._states_may_wait_there(),
        )  # fmt: skip

    def _states_may_wait_there(self) -> bool:
        """Whether states of the readout may be held on a GPU: no budget is set, and memory has not run out before."""
        return self.memory_budget is None and not self._short

    def _aimed(
        self, root: nn.Module, plan: Plan, team: Team, losses: LossPass | None, num_layers: int
    ) -> dict[str, Readout | Prediction]:
        """Readout and prediction, if they take part in a pass over this many layers, by the name of the view."""
        found: dict[str, Readout | Prediction] = {}
        if self.readout:
            found["readout"] = self._readout(root, plan, team, num_layers)
        if self.prediction and losses is not None:
            found["prediction"] = Prediction(
                self._predicted_plan(), losses,
                weighting=self.weighting, device=self._accumulates_on(root), team=team, num_layers=num_layers,
            )  # fmt: skip
        return found

    def _tell_of(self, view: str, why: str) -> None:
        """Warn once that a view could not be measured."""
        text = f"the {view} of the model could not be measured: {why}."
        if text not in self._told:
            self._told.add(text)
            warn(text, stacklevel=4)

    def _warn_if_bidirectional(self, forward: ProbeForward, layers: list[Layer]) -> None:
        """Warn once for each kind of model that looks at following tokens."""
        kind = _kind_of(forward.model)
        if not self._planes or kind in self._read_ahead:
            return
        self._read_ahead[kind] = bidirectional.sees_what_follows(forward, self.plan().batches, layers)
        if self._read_ahead[kind]:
            warn(bidirectional.explanation(forward.model), stacklevel=3)

    def _check_layers(self, forward: ProbeForward, layers: list[Layer], *, called: bool = False) -> None:
        """Compare the layers that were found with what the model returns, once for each kind of model.

        `called`: whether the model was called in this mode before.
        """
        checked = (_kind_of(access.bare(forward.model)), *(layer.name for layer in layers))
        if (
            not self._planes
            or self.layers != "hidden_states"
            or self.forward is not None
            or checked in self._cross_checked
        ):
            return
        crosscheck.check_hidden_states(forward, self.plan().batches, layers, called=called)
        self._cross_checked.add(checked)

    def _check_norm(self, root: nn.Module, layers: list[Layer]) -> Any:
        found = self._planes and self.layers == "hidden_states"
        return crosscheck.final_norm_reads_the_last_block(root, layers) if found else nullcontext()

    @contextmanager
    def _told_which_layers(self, forward: ProbeForward, layers: list[Layer]) -> Iterator[None]:
        """If layers that were found cannot be captured, raise the cross-check's error, if any: it names a cure."""
        try:
            yield
        except ModelError:
            self._check_layers(forward, layers)
            raise

    def _bar(self, team: Team, plan: Plan) -> Iterator[Round[Batch]]:
        """The rounds of a pass, with a progress bar."""
        rounds = list(team.rounds(plan.batches))
        shown = self.progress and team.ranks.is_first
        with progress_bar("information", total=len(rounds), unit="batch", shown=shown, delay=2.0) as done:
            for number, batches in enumerate(rounds, start=1):
                yield batches
                done(number)


# From each rank: its sums of each group of layers, for each probe, and its sums of codebooks.
_Parts = tuple[list[list[Sums | None]], dict[str, Sums | None]]


@dataclass(frozen=True)
class _Passes:
    """The results of the passes over one probe.

    groups: number of layers in each pass.
    parts: this rank's sums of its columns, for each pass.
    moments: moments of each pass, over all ranks.
    aimed: results of the codebooks of the output (readout and prediction), by name, with this rank's sums.
    """

    plan: Plan
    groups: list[int]
    parts: list[Sums | None]
    moments: list[Moments]
    aimed: dict[str, Outcome]


@dataclass(frozen=True)
class _Found:
    """The results of all passes of a measurement on one rank: `passes` over the main probe, then over further ones."""

    layers: list[Layer]
    passes: list[_Passes]
    losses: LossPass | None
    loss: Route | None
    sums: _Parts


def _joined(by_rank: list[list[Sums | None]], passes: _Passes, team: Team, variants: int) -> Sums:
    """Join the parts of all ranks in each pass to the sums of all layers."""
    parts = []
    for number, num_layers in enumerate(passes.groups):
        of_ranks = (by_rank[rank][number] for rank in team.by_layer(num_layers))
        parts += [part for part in of_ranks if part is not None]
    return Sums.join(parts, variants)


def _in_file(plan: Plan, files: ExitStack) -> Path | None:
    """Write a plan to a file and return its path; None if there is no room for it."""
    try:
        return files.enter_context(shared_plan(plan))
    except OSError:
        return None


def _check_alike(settings: list[dict[str, str]]) -> None:
    """Raise a ProbeError if the ranks have different settings."""
    for rank, other in enumerate(settings):
        if other["probe"] != settings[0]["probe"]:
            raise ProbeError(
                f"expected the same probes on every rank, got different ones on rank {rank} and rank 0. A stream "
                "that is split between the ranks gives each its own rows: build the probe once (ib-callback probe "
                "build, or Probe.save), and load it on every rank with Probe.load."
            )
        names = dict.fromkeys([*settings[0], *other])  # some settings are there only if they differ from the default
        differing = [name for name in names if other.get(name) != settings[0].get(name)]
        if differing:
            told = "; ".join(
                f"{name}: {settings[0].get(name)} on rank 0, {other.get(name)} on rank {rank}" for name in differing
            )
            raise ProbeError(f"expected the same settings on every rank that shares a measurement, got {told}.")


def _warn_if_short(device: torch.device, memory: int) -> None:
    free = free_memory(device)
    if free is not None and memory > free:
        warn(
            f"a measurement needs {memory / 2**20:,.0f} MiB in addition to the forward pass, but only "
            f"{free / 2**20:,.0f} MiB are free. Set memory_budget= (bytes) to measure layers in groups, or use a "
            "smaller probe.",
            stacklevel=3,
        )


def _kind_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def measure(model: nn.Module, probe: Probe, *, step: int | None = None, **meter_keywords: Any) -> Measurement:
    """Measure `model` on `probe` once.

    Args:
        model: as for `Meter.measure`.
        probe: frozen held-out text.
        step: number of optimizer steps taken so far, for the record.
        **meter_keywords: further arguments of `Meter`.

    Returns:
        The measured point, with information in fractions of log(num_bins).
    """
    return Meter(probe, **meter_keywords).measure(model, step=step)
