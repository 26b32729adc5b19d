"""Report about a run in plain sentences. Each sentence names the numbers on which it is based.

No sentence ranks checkpoints by information. In the runs of the study, no information number ranks checkpoints as well
as the held-out loss (docs/evidence.md). Information tells which phase a run is in.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ib_callback.results.guard import TOLERANCE
from ib_callback.results.measurement import CHANCE, Measurement
from ib_callback.results.metrics import FIRST_VIEW
from ib_callback.results.noise import MIN_VALUES, scatter
from ib_callback.results.phases import PERSISTENCE, PLANES, Phases
from ib_callback.results.trajectory import Trajectory

# Two values must differ by more than this many standard deviations of their difference to count as different. A
# selection uses the same limit.
_CLEAR = 2.0
# A fall of the complexity by this share before the fit counts as a collapse. The phase rule uses the same share.
_COLLAPSE = 1 / 3
# With a plain optimality above this, a model looks as if it were on the bound.
_ON_BOUND = 0.9
# The report gives the reason for at most this many missing points, with at most this many characters each.
_REASONS, _LONGEST_REASON = 3, 100
_NOTHING = "nothing can be concluded"


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number on which a sentence is based.

    Attributes:
        name: logged name without prefix; or "step", "error" or "settings", as in the file.
        step: step of the point; None if the point has no step.
        point: the point in words, such as "step 1,200", or the name of the checkpoint.
        value: the value; None if it is undefined; a text for an error and for settings.
    """

    name: str
    step: int | None
    point: str
    value: float | str | None


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One statement of a report.

    Attributes:
        topic: "points", "start", "phases", "loss", "generalisation", "planes", "features", "noise", "cost" or
            "conclusion".
        text: the statement in words, without the list of the numbers on which it is based.
        numbers: the numbers on which it is based.
    """

    topic: str
    text: str
    numbers: tuple[Number, ...]

    def __str__(self) -> str:
        return f"{self.text} [{_cited(self.numbers)}]"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report about one run or model.

    Attributes:
        model: name of the run or model.
        sentences: the sentences, in order.
    """

    model: str
    sentences: tuple[Sentence, ...]

    def paragraphs(self) -> list[str]:
        """One paragraph for each topic."""
        topics = dict.fromkeys(sentence.topic for sentence in self.sentences)
        return [" ".join(str(s) for s in self.sentences if s.topic == topic) for topic in topics]

    def objects(self) -> list[dict[str, Any]]:
        """One object for each sentence, as JSON values: model, topic, text, and numbers (name, step, point, value)."""
        return [{"model": self.model, **asdict(s), "numbers": [asdict(n) for n in s.numbers]} for s in self.sentences]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each number on which a sentence is based: model, topic, text, name, step, point, value."""
        return [
            {"model": self.model, "topic": sentence.topic, "text": sentence.text, **asdict(number)}
            for sentence in self.sentences
            for number in sentence.numbers
        ]


def report(trajectory: Trajectory, *, model: str = "", names: Sequence[str | None] | None = None) -> Report:
    """Report about a run. Its phases are found by the run's own phase rule.

    Args:
        trajectory: any trajectory. It may lack losses, nulls, views or step 0, begin from trained weights, or be empty.
        model: name of the run or model.
        names: a name for each point. The report uses it for points without a step.
    """
    return Report(model=model, sentences=tuple(_Telling(trajectory, names).sentences()))


def _cited(numbers: Iterable[Number]) -> str:
    """The numbers by name, each with its points; of more than three points, only the first and the last are named."""
    points: dict[str, dict[str, None]] = {}
    for number in numbers:
        points.setdefault(number.name, {})[number.point] = None
    groups: dict[str, list[str]] = {}
    for name, where in points.items():
        groups.setdefault(_places(list(where)), []).append(name)
    return "; ".join(f"{', '.join(names)} {where}" for where, names in groups.items())


def _places(points: Sequence[str]) -> str:
    is_step = all(point.startswith("step ") for point in points)
    if is_step:  # a sentence may name its last point first
        points = sorted(points, key=lambda point: int(point.removeprefix("step ").replace(",", "")))
    steps = [point.removeprefix("step ") for point in points]
    if len(points) > 3:
        return f"at {len(points)} points from {points[0]} to {points[-1]}"
    listed = _listed(steps if is_step else points)
    return f"at {'step' if len(points) == 1 else 'steps'} {listed}" if is_step else f"of {listed}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _f(value: float | None) -> str:
    """A number with three decimals, or with two significant digits if it is too small for that."""
    return "undefined" if value is None else f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


class _Telling:
    """Makes the sentences of one run, and records the numbers that they use."""

    def __init__(self, trajectory: Trajectory, names: Sequence[str | None] | None) -> None:
        self._all = trajectory
        names = names or [None] * len(trajectory)
        self._names = {
            id(point): f"step {point.step:,}" if point.step is not None else name or f"point {number}"
            for number, (point, name) in enumerate(zip(trajectory, names, strict=True), start=1)
        }
        self._points = [point for point in trajectory if point.error is None]
        self._failed = [point for point in trajectory if point.error is not None]
        self._in_steps = [point for point in self._points if point.step is not None]
        self._phases: Phases | None = trajectory.phases() if self._in_steps else None
        self._steps = {point.step: point for point in self._in_steps}
        self._losses = [point for point in self._points if point.loss is not None]
        self._is_course = len(self._in_steps) > 1
        self._scatters: dict[str, float | None] = {}

    def sentences(self) -> Iterator[Sentence]:
        """All sentences."""
        yield from self._of_points()
        if self._points:
            yield from self._of_start()
            yield from self._of_phases()
            yield from self._of_loss()
            yield from self._of_generalisation()
            yield from self._of_planes()
            yield from self._of_features()
            yield from self._of_noise()
            yield from self._of_cost()
        yield from self._of_conclusion()

    # --- helpers

    def _cite(self, name: str, *points: Measurement) -> list[Number]:
        own: Mapping[str, Any]
        found = []
        for point in points:
            own = {"step": point.step, "error": point.error}
            value = own[name] if name in own else point.scalars().get(name)
            found.append(Number(name=name, step=point.step, point=self._names[id(point)], value=value))
        return found

    def _where(self, point: Measurement) -> str:
        return self._names[id(point)]

    def _ends(self) -> list[Measurement]:
        """The first and the last point, or the only one."""
        return [self._points[0], self._points[-1]] if len(self._points) > 1 else self._points

    def _value(self, point: Measurement, name: str) -> float | None:
        return point.scalars().get(name)

    def _having(self, name: str) -> list[Measurement]:
        return [point for point in self._points if self._value(point, name) is not None]

    def _plane(self) -> tuple[str, str, str]:
        """The plane of the phases in words, and the logged names of its complexity and expressivity."""
        assert self._phases is not None
        plane = self._phases.plane or "plain"
        view, ending = PLANES[plane]
        start = f"{view}/" if view else ""
        primary = self._in_steps[0].primary
        name = "plane above the null" if plane == "above_null" else f"{plane} plane"
        return name, f"{start}{primary}/complexity{ending}", f"{start}{primary}/expressivity{ending}"

    # --- topics

    def _of_points(self) -> Iterator[Sentence]:
        if not self._all:
            yield Sentence(topic="points", text="The run has no points.", numbers=(_whole("points", 0),))
        elif self._points:
            places = [self._where(point) for point in self._ends()]
            text = f"One point was measured: {places[0]}."
            if len(places) > 1:
                text = f"{len(self._points)} points were measured, from {places[0]} to {places[1]}."
            yield Sentence(topic="points", text=text, numbers=(*self._cite("step", *self._ends()),))
        if self._failed:
            told = [f"{self._where(p)} ({_reason(p)})" for p in self._failed[:_REASONS]]
            more = f", and {len(self._failed) - _REASONS} more" if len(self._failed) > _REASONS else ""
            text = (
                f"{len(self._failed)} of {len(self._all)} points could not be measured and "
                f"{'are' if len(self._failed) > 1 else 'is'} left out below: {', '.join(told)}{more}."
            )
            yield Sentence(topic="points", text=text, numbers=(*self._cite("error", *self._failed),))
        for name, difference in self._all.mixture.items():
            text = f"A setting changes within the run: {difference}. {_NOTHING.capitalize()} across that change."
            yield Sentence(topic="points", text=text, numbers=(_whole(f"settings.{name}", difference),))

    def _of_start(self) -> Iterator[Sentence]:
        first = self._points[0]
        if self._phases is not None and self._phases.trained:
            better = first.predictive_information
            if first.step == 0 and better is not None:
                text = (
                    "The run begins from trained weights, so it has no phases: before the first step the model already "
                    f"predicts the next token {better:.2f} nats better than token frequencies do."
                )
                yield Sentence(topic="start", text=text, numbers=(*self._cite("predictive_information", first),))
            else:
                text = "The phase rule of the run says that it begins from trained weights, so it has no phases."
                yield Sentence(topic="start", text=text, numbers=(_whole("phase_rule.from_trained", "true"),))
        elif first.step == 0:
            yield self._untrained(first)
        elif self._phases is not None:
            text = (
                f"Step 0 was not measured: {_NOTHING} about the untrained model, or about a collapse before "
                f"{self._where(first)}."
            )
            yield Sentence(topic="start", text=text, numbers=(*self._cite("step", first),))

    def _untrained(self, first: Measurement) -> Sentence:
        if not first.orders:
            text = f"No order was measured, so {_NOTHING} about the plane of the untrained model."
            return Sentence(topic="start", text=text, numbers=(*self._cite("complexity", first),))
        widest = list(first.orders)[-1]
        point = first[widest]
        text = (
            f"Before training, with {widest}s as labels: complexity {_f(point.complexity)}, expressivity "
            f"{_f(point.expressivity)}, optimality {_f(point.optimality)}."
        )
        text += " The model looks as if it were on the bound." if (point.optimality or 0) > _ON_BOUND else ""
        names = ["complexity", "expressivity", "optimality"]
        if point.complexity_null is None:
            text += f" Without a null {_NOTHING} from these numbers, because chance alone may give as much."
        elif point.complexity:
            names.append("complexity_null")
            share = point.complexity_null / point.complexity
            text += (
                f" Randomly shuffled labels (the null) already give {_f(point.complexity_null)}, which is {share:.0%} "
                "of this complexity."
            )
            if share > 0.5:
                text += (
                    " Labels that occur at only a few positions of the probe always look informative. Read the values "
                    "above null instead."
                )
        numbers = [number for name in names for number in self._cite(f"{widest}/{name}", first)]
        return Sentence(topic="start", text=text, numbers=(*numbers,))

    def _of_phases(self) -> Iterator[Sentence]:
        phases = self._phases
        if phases is None or not self._is_course:
            few = "Only one point was measured" if len(self._points) == 1 else "Fewer than two points have a step"
            text = f"{few}, so {_NOTHING} about phases."
            yield Sentence(topic="phases", text=text, numbers=(*self._cite("step", *self._ends()),))
            return
        if phases.trained:
            return
        plane, complexity, expressivity = self._plane()
        known = [p for p in self._in_steps if self._value(p, complexity) is not None]
        if len(known) < 2:
            text = f"Fewer than two points have values on the {plane}, so {_NOTHING} about phases."
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, *self._ends()),))
            return
        first, last = known[0], known[-1]
        if phases.fit_start is None:
            now, before = self._value(last, expressivity), self._value(first, expressivity)
            text = (
                f"Fitting has not begun. On the {plane}, the expressivity was {_f(before)} at {self._where(first)} and "
                f"is {_f(now)} at the end. It has never clearly risen above its start. {_NOTHING.capitalize()} about "
                "compression before a model fits. Train longer, or measure more often."
            )
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(expressivity, first, last),))
            yield from self._lowest(known, complexity)
            return
        if first.step == 0:
            yield self._initial(first, known, complexity, plane)
        yield self._fitting(first, last, expressivity, plane)
        yield self._compression(known, complexity, expressivity, plane)
        gone = [p for p, collapsed in zip(self._all, phases.collapsed, strict=True) if collapsed and p.error is None]
        if gone:
            share = self._all.rule.collapse
            text = (
                f"At {len(gone)} {'points' if len(gone) > 1 else 'point'} the expressivity is below {share:.0%} of its "
                "earlier maximum. The hidden states have collapsed there, and a low complexity means nothing."
            )
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(expressivity, *gone),))

    def _lowest(self, known: Sequence[Measurement], complexity: str) -> Iterator[Sentence]:
        """Warn that the point of lowest complexity is not a good one, in a run that has not begun to fit."""
        first, lowest = known[0], min(known, key=lambda p: self._value(p, complexity) or 0.0)
        before, there = self._value(first, complexity) or 0.0, self._value(lowest, complexity) or 0.0
        if there < (1 - _COLLAPSE) * before:
            text = (
                f"The complexity is lowest at {self._where(lowest)}: {_f(there)}, after {_f(before)} at "
                f"{self._where(first)}. Such a fall is a collapse: the hidden states of different positions become "
                "alike. Never choose a checkpoint by low complexity or small distance alone."
            )
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, first, lowest),))

    def _initial(self, first: Measurement, known: Sequence[Measurement], complexity: str, plane: str) -> Sentence:
        assert self._phases is not None
        end = self._steps.get(self._phases.fit_start, first)
        before, there = self._value(first, complexity) or 0.0, self._value(end, complexity) or 0.0
        if end is first:
            values = [(value, point) for point in known if (value := self._value(point, complexity)) is not None]
            there, lowest = min(values, key=lambda each: each[0], default=(before, first))
            course = f"the complexity is {_f(before)} at the start and never lower"
            if there < before:
                course = (
                    f"the complexity is {_f(before)} at the start and lowest at {self._where(lowest)}, with "
                    f"{_f(there)}. The phase rule does not count this as a collapse"
                )
            text = f"No collapse was seen on the {plane}: {course}."
            ends = [first] if lowest is first else [first, lowest]
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, *ends),))
        if there >= (1 - _COLLAPSE) * before:
            text = (
                f"No collapse was seen on the {plane}: before the fit, the complexity is lowest at {self._where(end)}, "
                f"with {_f(there)}, after {_f(before)} at {self._where(first)}."
            )
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, first, end),))
        entropies = [_f(point.entropy) for point in (first, end)]
        text = (
            f"The run begins with a collapse until {self._where(end)}: the hidden states of different positions "
            f"become alike. On the {plane}, the complexity fell from {_f(before)} to {_f(there)}. "
            f"The mean entropy H(Z) of the layers went from {entropies[0]} to {entropies[1]}."
        )
        if end is min(known, key=lambda p: self._value(p, complexity) or 0.0):
            text += (
                " This is the lowest complexity of the run: the most compressed checkpoint is also the most useless "
                "one. Never choose a checkpoint by low complexity or small distance alone."
            )
        numbers = self._cite(complexity, first, end) + self._cite("entropy", first, end)
        return Sentence(topic="phases", text=text, numbers=(*numbers,))

    def _fitting(self, first: Measurement, last: Measurement, expressivity: str, plane: str) -> Sentence:
        phases = self._phases
        assert phases is not None
        start = self._steps.get(phases.fit_start) or first
        values = [_f(self._value(point, expressivity)) for point in (start, last)]
        known = phases.fit_recognised
        seen = "" if known in (None, start.step) else f" (recognised at step {known:,})"
        text = (
            f"Fitting begins at {self._where(start)}{seen}. On the {plane}, the expressivity (what the hidden states "
            f"tell about the text that follows) goes from {values[0]} there to {values[1]} at {self._where(last)}."
        )
        return Sentence(topic="phases", text=text, numbers=(*self._cite(expressivity, start, last),))

    def _compression(self, known: Sequence[Measurement], complexity: str, expressivity: str, plane: str) -> Sentence:
        phases = self._phases
        assert phases is not None
        assert phases.fit_start is not None
        last = known[-1]
        start = phases.compression_start if phases.compression_start is not None else phases.off_bound_start
        if start in self._steps:
            top = self._steps[start]
            told = [
                f"{word} goes from {_f(self._value(top, name))} to {_f(self._value(last, name))}"
                for word, name in (("complexity", complexity), ("expressivity", expressivity))
            ]
            if phases.compression_start is not None:
                known_at = phases.compression_recognised
                seen = "" if known_at is None else f" (recognised at step {known_at:,})"
                text = (
                    f"Compression begins at {self._where(top)}{seen}. From there to the end, on the {plane}, the "
                    f"{told[0]}, and the {told[1]}."
                )
            else:
                text = (
                    f"From {self._where(top)} to the end, on the {plane}, the {told[0]}, and the {told[1]}. Both fall "
                    "and the run moves away from the bound, so this is not compression."
                )
            numbers = self._cite(complexity, top, last) + self._cite(expressivity, top, last)
            return Sentence(topic="phases", text=text, numbers=(*numbers,))
        since = [p for p in known if (p.step or 0) >= phases.fit_start]
        top = max(since, key=lambda p: self._value(p, complexity) or 0.0)
        if top is last:
            text = (
                f"No compression was recognised: on the {plane}, the complexity is highest at the last point, "
                f"{self._where(top)}, with {_f(self._value(top, complexity))}."
            )
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, top),))
        text = (
            f"No compression was recognised. On the {plane}, the highest complexity since the fit began is "
            f"{_f(self._value(top, complexity))}, at {self._where(top)}. At the end it is "
            f"{_f(self._value(last, complexity))}. "
        )
        text += (
            "A fall while a model memorises is not compression."
            if phases.memorising_start is not None
            else "The hidden states have collapsed there, which is not compression."
            if next(collapsed for p, collapsed in zip(self._all, phases.collapsed, strict=True) if p is last)
            else "This fall is not certain. Short runs often never compress."
        )
        return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, top, last),))

    def _of_loss(self) -> Iterator[Sentence]:
        if not self._losses:
            why = self._points[-1].settings.get("loss")
            path = why.get("path") if isinstance(why, Mapping) else None
            because = f" ({path})" if isinstance(path, str) and path.startswith("none") else ""
            text = f"No held-out loss was measured{because}, so {_NOTHING} about how good any point is."
            yield Sentence(topic="loss", text=text, numbers=(*self._cite("loss", self._points[-1]),))
            return
        lowest, last = self._lowest_loss(), self._losses[-1]
        if len(self._losses) == 1:
            text = f"The held-out loss is {_f(last.loss)} nats a token."
        elif lowest is last:
            first = self._losses[0]
            text = (
                f"The held-out loss is lowest at the last point, {self._where(last)}, with {_f(last.loss)} nats a "
                f"token. At {self._where(first)} it was {_f(first.loss)}."
            )
            lowest = first
        else:
            text = (
                f"The held-out loss is lowest at {self._where(lowest)}, with {_f(lowest.loss)} nats a token. At the "
                f"last point, {self._where(last)}, it is {_f(last.loss)}."
            )
            if self._may_be_noise("loss", lowest, last):
                text += " This difference may be noise."
        numbers = self._cite("loss", *dict.fromkeys((lowest, last)))
        yield Sentence(topic="loss", text=text, numbers=(*numbers,))
        if last.bits_per_byte is not None:
            text = (
                f"At {self._where(last)} the loss is {_f(last.bits_per_byte)} bits a byte of text, a unit that does "
                "not depend on the tokenizer."
            )
            yield Sentence(topic="loss", text=text, numbers=(*self._cite("bits_per_byte", last),))

    def _lowest_loss(self) -> Measurement:
        return min(self._losses, key=lambda point: point.loss or 0.0)

    def _of_generalisation(self) -> Iterator[Sentence]:
        """Memorising, collapse and divergence, according to the rules for phases and for stopping."""
        phases, losses = self._phases, [point for point in self._losses if point.step is not None and point.scheduled]
        if phases is None or len(losses) < 2:
            return
        if self._all.rule.tolerance is None:
            text = f"The phase rule of the run ignores the loss, so {_NOTHING} about memorising or divergence."
            yield Sentence(topic="generalisation", text=text, numbers=(_whole("phase_rule.tolerance", None),))
            return
        tolerance = self._all.rule.tolerance
        lowest, last = min(losses, key=lambda p: p.loss or 0.0), losses[-1]
        above = (last.loss or 0.0) - (lowest.loss or 0.0)
        worse = next((n for n, p in enumerate(reversed(losses)) if (p.loss or 0) <= (lowest.loss or 0) + tolerance), 0)
        trained = [point.train_loss for point in (lowest, last)]
        numbers = self._cite("loss", lowest, last) if above else self._cite("loss", last)
        known = None not in trained and lowest is not last
        if known:
            numbers += self._cite("train_loss", lowest, last)
        training = f", while the training loss went from {_f(trained[0])} to {_f(trained[1])}" if known else ""
        if phases.memorising_start is not None:
            numbers = [n for n in numbers if n.step is not None]
            text = (
                f"The model memorises from {self._where(self._steps[phases.memorising_start])} on: at the end the "
                f"held-out loss is {above:.2f} nats above its lowest value"
                f"{training or ', and the training loss is not known'}."
            )
        elif not worse:
            text = (
                f"Neither memorising nor divergence: the held-out loss ends {above:.3f} nats above its lowest value, "
                f"within the tolerance of {tolerance:g}{training}."
            )
        elif worse < PERSISTENCE:
            text = (
                f"At the end the held-out loss is {above:.2f} nats above its lowest value{training}. It exceeds the "
                f"tolerance of {tolerance:g} only at the last {_counted(worse)}, and the rule needs {PERSISTENCE}: "
                f"{_NOTHING} about memorising or divergence."
            )
        else:
            collapsed = phases.collapsed[next(n for n, point in enumerate(self._all) if point is last)]
            what = (
                "The hidden states have collapsed"
                if collapsed
                else "This is expected in fine-tuning on other text, but it may also be overfitting. The probe cannot "
                "tell the two apart"
                if phases.trained
                else "Training diverges"
            )
            text = (
                f"At the last {_counted(worse)} the held-out loss exceeds its lowest value by more than {tolerance:g} "
                f"nats, at the end by {above:.2f}{training}. {what}."
            )
        yield Sentence(topic="generalisation", text=text, numbers=(*numbers,))

    def _of_planes(self) -> Iterator[Sentence]:
        last = self._points[-1]
        primary = last.primary or "token"
        for view, whose in (
            ("prediction", "the model's next-token probabilities"),
            ("readout", "the last states by the output embeddings"),
        ):
            yield self._view(view, whose, primary)
        if last.primary not in last.orders:
            return
        point = last.orders[primary]
        where = f"At {self._where(last)}" if last.step is not None else f"For {self._where(last)}"
        local = [f"{primary}/{name}_local" for name in ("complexity", "expressivity", "optimality")]
        if point.complexity_local is not None:
            ratio = point.optimality_local
            text = (
                f"{where}, local (above the document baseline): complexity {_f(point.complexity_local)}, "
                f"expressivity {_f(point.expressivity_local)}, optimality {_f(ratio)}"
                f"{' because the local complexity is too small' if ratio is None else ''}. These are means over layers."
            )
            yield Sentence(topic="planes", text=text, numbers=(*(n for each in local for n in self._cite(each, last)),))
        plain = [f"{primary}/{name}" for name in ("complexity", "expressivity", "optimality")]
        text = (
            f"{where}, plain, with {primary}s as labels: complexity {_f(point.complexity)}, expressivity "
            f"{_f(point.expressivity)}, optimality {_f(point.optimality)}."
        )
        numbers = [number for name in plain for number in self._cite(name, last)]
        if last.ceiling is not None:
            text += f" No labels could reach more than {_f(last.ceiling)} (the ceiling)."
            numbers += self._cite("ceiling", last)
        if point.complexity_null is None or point.expressivity_null is None:
            text += f" Without a null {_NOTHING} from these numbers, because chance alone may give as much."
        else:
            nulls = ("complexity_null", "expressivity_null", "complexity_above_null", "expressivity_above_null")
            numbers += [number for name in nulls for number in self._cite(f"{primary}/{name}", last)]
            text += (
                f" The null is {_f(point.complexity_null)}. So the true complexity usually lies between "
                f"{_f(point.complexity_above_null)} and {_f(point.complexity)}, and the true expressivity between "
                f"{_f(point.expressivity_above_null)} and {_f(point.expressivity)}. The optimality above null is "
                f"{_f(point.optimality_above_null)}."
            )
            numbers += self._cite(f"{primary}/optimality_above_null", last)
        yield Sentence(topic="planes", text=text, numbers=(*numbers,))

    def _view(self, view: str, whose: str, primary: str) -> Sentence:
        names = {name: f"{view}/{primary}/{name}_local" for name in ("complexity", "expressivity", "score")}
        known = self._having(names["expressivity"])
        if not known:
            why = self._points[-1].settings.get(view)
            why = why.get("why") if isinstance(why, Mapping) else None
            text = f"{_NOTHING.capitalize()} about the {view} plane: it was not measured{f' ({why})' if why else ''}."
            return Sentence(topic="planes", text=text, numbers=(*self._cite(names["expressivity"], self._points[-1]),))
        last = known[-1]
        complexity, expressivity, score = (self._value(last, name) for name in names.values())
        at = f"{'at' if last.step is not None else 'for'} {self._where(last)}"
        text = (
            f"On the {view} plane ({whose}), {at}: local complexity {_f(complexity)}, local "
            f"expressivity {_f(expressivity)}, score {_f(score)}"
        )
        text += " because the local complexity is too small." if score is None else "."
        numbers = [number for name in names.values() for number in self._cite(name, last)]
        scored = self._having(names["score"])
        if len(scored) > 1:
            best = max(scored, key=lambda p: self._value(p, names["score"]) or 0.0)
            text += (
                " The score is highest there."
                if best is last
                else f" The score is highest at {self._where(best)}, with {_f(self._value(best, names['score']))}"
            )
            if best is not last:
                text += ", but the difference may be noise." if self._may_be_noise(names["score"], best, last) else "."
                numbers += self._cite(names["score"], best)
        return Sentence(topic="planes", text=text, numbers=(*numbers,))

    def _of_features(self) -> Iterator[Sentence]:
        last = self._points[-1]
        for name, feature in last.features.items():
            text = f"{name}: the information is {_f(feature.information)}. Random labels have "
            text += f"{_f(feature.information_null)}."
            cited = ["information", "information_null"]
            chance = feature.information_p_value
            if chance is None:
                text += f" Without permutations {_NOTHING} about whether this is chance."
            else:
                cited.append("information_p_value")
                text += (
                    f" This may be chance (p {chance:.2g}), so {_NOTHING}."
                    if chance > CHANCE
                    else f" This is more than chance (p {chance:.2g})."
                )
            if feature.ratio is not None:
                cited.append("ratio")
                text += f" Its ratio to the complexity is {_f(feature.ratio)}."
            numbers = [number for each in cited for number in self._cite(f"{name}/{each}", last)]
            yield Sentence(topic="features", text=text, numbers=(*numbers,))

    def _of_noise(self) -> Iterator[Sentence]:
        primary = self._points[-1].primary or "token"
        for name in (f"{FIRST_VIEW}/{primary}/score_local", f"{primary}/optimality_local", f"{primary}/optimality"):
            if self._having(name):
                yield self._noise(name)
                break
        if len(self._losses) > 1:
            yield self._noise("loss")

    def _since_fit(self, name: str) -> list[Measurement]:
        """The points since the fit began that have a number; all such points if fitting has not begun."""
        start = -1 if self._phases is None or self._phases.fit_start is None else self._phases.fit_start
        return [p for p in self._having(name) if p.step is None or p.step >= start]

    def _scattered(self, name: str) -> dict[int, Measurement]:
        """The points from which the noise of a number is estimated, by step."""
        return {p.step: p for p in self._since_fit(name) if p.step is not None and p.scheduled}

    def _scatter(self, name: str) -> float | None:
        """The noise of one value of a number; None if it is not known."""
        if name not in self._scatters:
            points = self._scattered(name)
            self._scatters[name] = scatter([self._value(p, name) or 0.0 for p in points.values()], [*points])
        return self._scatters[name]

    def _least(self, name: str) -> float:
        """Two values of a number that differ by this much or less may differ by noise; 0 if the noise is not known."""
        return _CLEAR * 2**0.5 * (self._scatter(name) or 0.0)

    def _may_be_noise(self, name: str, first: Measurement, second: Measurement) -> bool:
        """Whether noise may explain the difference of two points. Every sentence that compares points asks this."""
        return abs((self._value(first, name) or 0.0) - (self._value(second, name) or 0.0)) <= self._least(name)

    def _noise(self, name: str) -> Sentence:
        known, steps = self._since_fit(name), self._scattered(name)
        having = known or self._having(name)
        # The last point with a known error, because the error of one point says nothing about another.
        last = next((p for p in reversed(having) if self._value(p, f"{name}_se") is not None), having[-1])
        noise = self._scatter(name)
        error = self._value(last, f"{name}_se")
        if noise is None and error is None:
            text = (
                f"The noise of {name} is not known. An estimate needs {MIN_VALUES} points, or standard errors, and "
                f"there {'is' if len(steps) == 1 else 'are'} only {len(steps)}. {_NOTHING.capitalize()} from small "
                "differences."
            )
            return Sentence(topic="noise", text=text, numbers=(*self._cite(name, *(steps.values() or [last])),))
        parts, numbers = [], []
        if error is not None:
            where = f"At {self._where(last)}" if last.step is not None else f"For {self._where(last)}"
            parts.append(
                f"{where}, {name} is {_f(self._value(last, name))}. Between probes of this size it varies by "
                f"{error:.2g} (standard error)."
            )
            numbers += self._cite(name, last) + self._cite(f"{name}_se", last)
        if noise is not None:
            parts.append(
                f"Single values of {name} scatter by {noise:.2g} around a smooth curve, so differences of up to "
                f"{self._least(name):.2g} may be noise."
            )
            numbers += self._cite(name, *steps.values())
            best = (min if name == "loss" else max)(known, key=lambda p: self._value(p, name) or 0.0)
            if best is not known[-1]:
                gap = abs((self._value(best, name) or 0.0) - (self._value(known[-1], name) or 0.0))
                since = " since the fit began" if len(known) < len(self._having(name)) else ""
                parts.append(
                    f"The {'lowest' if name == 'loss' else 'highest'} value{since}, at {self._where(best)}, differs "
                    f"from the last by {gap:.2g}. This "
                    f"{'may be' if self._may_be_noise(name, best, known[-1]) else 'is more than'} noise."
                )
                numbers = [*dict.fromkeys([*numbers, *self._cite(name, best, known[-1])])]
        return Sentence(topic="noise", text=" ".join(parts), numbers=(*numbers,))

    def _of_cost(self) -> Iterator[Sentence]:
        timed = [point for point in self._points if point.seconds is not None]
        if not timed:
            return
        seconds = [point.seconds or 0.0 for point in timed]
        number = f"{len(timed)} measurements took" if len(timed) > 1 else "The measurement took"
        each = f", with a median of {statistics.median(seconds):.1f} s" if len(timed) > 1 else ""
        text = f"{number} {sum(seconds):.0f} s{each}."
        numbers = self._cite("seconds", *timed)
        share = timed[-1].overhead
        if share is not None:
            text += f" With files and pictures, measuring took {share:.1%} of the time of the run."
            numbers += self._cite("overhead", timed[-1])
        yield Sentence(topic="cost", text=text, numbers=(*numbers,))

    def _of_conclusion(self) -> Iterator[Sentence]:
        if not self._points:
            why = "the run has no points" if not self._all else f"none of its {len(self._all)} points could be measured"
            cited = self._cite("error", *self._failed) if self._failed else [_whole("points", 0)]
            yield Sentence(topic="conclusion", text=f"Nothing can be concluded: {why}.", numbers=(*cited,))
            return
        if not self._is_course:
            which = "one point" if len(self._points) == 1 else "points without steps"
            text = (
                f"{_NOTHING.capitalize()} about training from {which}. You can compare models that were measured on "
                "the same probe."
            )
            yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("step", *self._ends()),))
            return
        if not self._losses:
            text = (
                f"{_NOTHING.capitalize()} about which point is best: no loss was measured, and no information number "
                "is known to rank checkpoints as well as the loss does."
            )
            yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("loss", *self._ends()),))
            return
        # Differences count as none if the rules tolerate them, or if they may be noise.
        tolerance, least = self._all.rule.tolerance or TOLERANCE, self._least("loss")
        margin = max(tolerance, least)
        lowest, last = self._lowest_loss(), self._losses[-1]
        equal = [p for p in self._losses if (p.loss or 0.0) <= (lowest.loss or 0.0) + margin]
        text = f"Choose by the loss: it is lowest at {self._where(lowest)}"
        others = [self._where(point) for point in equal if point is not lowest]
        if others:
            listed = len(others) < 3
            which = f"{len(others)} other points" if len(others) > 1 else "One other point"
            which += "" if listed else f", from {others[0]} to {others[-1]},"
            why = "may be noise" if least > tolerance else "is too small to count"
            text += (
                f". {which} {'lie' if len(others) > 1 else 'lies'} within {margin:.3g} nats of it"
                f"{f': {_listed(others)}' if listed else ''}. Such a difference {why}, so neither the "
                "loss nor information ranks these points."
            )
        else:
            text += f", and no other point is within {margin:.3g} nats of that."
        if lowest is last:
            text += " The lowest loss is the last one, so the run does not show whether longer training would lower it."
        yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("loss", *equal),))


def _counted(number: int) -> str:
    return "point" if number == 1 else f"{number} points"


def _whole(name: str, value: float | str | None) -> Number:
    """A number that belongs to the whole run."""
    return Number(name=name, step=None, point="the run", value=value)


def _reason(point: Measurement) -> str:
    reason = " ".join((point.error or "").split())
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 1]}…"
