"""Report about a run in plain sentences. Each names the numbers on which it is based; some say that nothing was found.

No sentence ranks checkpoints by information, because in the runs of the study none of its numbers does that as well as
the held-out loss (docs/evidence.md). Information adds which phase a run is in, and why.
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

# A difference of more than this many standard deviations does not count as noise, as in a selection.
_CLEAR = 2.0
# A fall of the complexity by this share before the fit counts as a collapse, as for phases.
_COLLAPSE = 1 / 3
# From this plain optimality on, a model looks as if it were on the bound.
_ON_BOUND = 0.9
# Reasons are given for this many missing points, with at most this many characters each.
_REASONS, _LONGEST_REASON = 3, 100
_NOTHING = "nothing can be concluded"


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number on which a sentence is based.

    Attributes:
        name: logged name without prefix; or "step", "error" or "settings", as in the file.
        step: step of the point; None if it has none.
        point: the point in words, "step 1,200", or the name of the checkpoint.
        value: the value; None if undefined; a text for an error and for settings.
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
        text: one or two sentences, without the numbers on which they are based.
        numbers: the numbers on which they are based.
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
    """Report about a run, with its own phase rule.

    Args:
        trajectory: any trajectory, also without losses, nulls, views or step 0, from trained weights, with one point or
            none.
        model: name of the run or model.
        names: a name for each point, used if it has no step.
    """
    return Report(model=model, sentences=tuple(_Telling(trajectory, names).sentences()))


def _cited(numbers: Iterable[Number]) -> str:
    """The numbers by name, each with its points; for many successive points, only the first and the last."""
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
            yield Sentence(topic="points", text="There is no point.", numbers=(_whole("points", 0),))
        elif self._points:
            number = f"{len(self._points)} points were" if len(self._points) > 1 else "One point was"
            between = " to ".join(self._where(point) for point in self._ends())
            text = f"{number} measured, {'from ' if len(self._points) > 1 else ''}{between}."
            yield Sentence(topic="points", text=text, numbers=(*self._cite("step", *self._ends()),))
        if self._failed:
            told = [f"{self._where(p)} ({_reason(p)})" for p in self._failed[:_REASONS]]
            more = f", and {len(self._failed) - _REASONS} more" if len(self._failed) > _REASONS else ""
            text = (
                f"{len(self._failed)} of {len(self._all)} points could not be measured, and are left out of all that "
                f"follows: {', '.join(told)}{more}."
            )
            yield Sentence(topic="points", text=text, numbers=(*self._cite("error", *self._failed),))
        for name, difference in self._all.mixture.items():
            text = f"Its points cannot be compared throughout ({difference}): {_NOTHING} across that change."
            yield Sentence(topic="points", text=text, numbers=(_whole(f"settings.{name}", difference),))

    def _of_start(self) -> Iterator[Sentence]:
        first = self._points[0]
        if self._phases is not None and self._phases.trained:
            better = first.predictive_information
            if first.step == 0 and better is not None:
                text = (
                    f"The run begins from trained weights, and so has no phases: before its first step the model "
                    f"predicts the next token {better:.2f} nats better than the frequencies of tokens do."
                )
                yield Sentence(topic="start", text=text, numbers=(*self._cite("predictive_information", first),))
            else:
                text = "The run begins from trained weights, by its own rule, so it has no phases."
                yield Sentence(topic="start", text=text, numbers=(_whole("phase_rule.from_trained", "true"),))
        elif first.step == 0:
            yield self._untrained(first)
        elif self._phases is not None:
            text = (
                f"Step 0 was not measured: {_NOTHING} on the untrained model, nor on a collapse before "
                f"{self._where(first)}."
            )
            yield Sentence(topic="start", text=text, numbers=(*self._cite("step", first),))

    def _untrained(self, first: Measurement) -> Sentence:
        if not first.orders:
            text = f"No order was measured, so that {_NOTHING} on the plane of the untrained model."
            return Sentence(topic="start", text=text, numbers=(*self._cite("complexity", first),))
        widest = list(first.orders)[-1]
        point = first[widest]
        text = (
            f"Before training, at {widest}s: complexity {_f(point.complexity)}, expressivity {_f(point.expressivity)}, "
            f"optimality {_f(point.optimality)}, "
        )
        text += (
            "as if the model were on the bound." if (point.optimality or 0) > _ON_BOUND else "of an untrained model."
        )
        names = ["complexity", "expressivity", "optimality"]
        if point.complexity_null is None:
            text += f" Without a null {_NOTHING} from that, because chance alone may give as much."
        elif point.complexity:
            names.append("complexity_null")
            share = point.complexity_null / point.complexity
            text += (
                f" Labels shuffled at random (the null) already give {_f(point.complexity_null)}, {share:.0%} of that "
                "complexity"
            )
            many = f": most {widest}s occur only once in a probe, and a label with few positions always looks "
            text += f"{many}informative. Read wide orders above their null." if share > 0.5 else "."
        numbers = [number for name in names for number in self._cite(f"{widest}/{name}", first)]
        return Sentence(topic="start", text=text, numbers=(*numbers,))

    def _of_phases(self) -> Iterator[Sentence]:
        phases = self._phases
        if phases is None or not self._is_course:
            few = "One point has no course" if len(self._points) == 1 else "Points without a step have no course"
            text = f"{few}: {_NOTHING} on phases of training."
            yield Sentence(topic="phases", text=text, numbers=(*self._cite("step", *self._ends()),))
            return
        if phases.trained:
            return
        plane, complexity, expressivity = self._plane()
        known = [p for p in self._in_steps if self._value(p, complexity) is not None]
        if len(known) < 2:
            text = f"Under two points have values on the {plane}: {_NOTHING} on phases."
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, *self._ends()),))
            return
        first, last = known[0], known[-1]
        if phases.fit_start is None:
            now, before = self._value(last, expressivity), self._value(first, expressivity)
            text = (
                f"Fitting has not begun (read on the {plane}): the expressivity is {_f(now)} in the end and was "
                f"{_f(before)} at {self._where(first)}, and has not clearly exceeded that. {_NOTHING.capitalize()} on "
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
                "highest before: representations have collapsed there, and a low complexity means nothing."
            )
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(expressivity, *gone),))

    def _lowest(self, known: Sequence[Measurement], complexity: str) -> Iterator[Sentence]:
        """Say that the most compressed point of a run without a fit is not a good one."""
        first, lowest = known[0], min(known, key=lambda p: self._value(p, complexity) or 0.0)
        before, there = self._value(first, complexity) or 0.0, self._value(lowest, complexity) or 0.0
        if there < (1 - _COLLAPSE) * before:
            text = (
                f"The complexity was lowest at {self._where(lowest)}, {_f(there)} after {_f(before)} at "
                f"{self._where(first)}: representations have moved onto each other. Never choose a checkpoint by low "
                "complexity or small distance alone."
            )
            yield Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, first, lowest),))

    def _initial(self, first: Measurement, known: Sequence[Measurement], complexity: str, plane: str) -> Sentence:
        assert self._phases is not None
        end = self._steps.get(self._phases.fit_start, first)
        before, there = self._value(first, complexity) or 0.0, self._value(end, complexity) or 0.0
        if end is first:
            values = [(value, point) for point in known if (value := self._value(point, complexity)) is not None]
            there, lowest = min(values, key=lambda each: each[0], default=(before, first))
            course = f"the complexity, {_f(before)} at the start, is never lower"
            if there < before:
                course = (
                    f"the complexity, {_f(before)} at the start, is lowest at {self._where(lowest)}, {_f(there)}. "
                    "The rule for phases does not count that as one"
                )
            text = f"No collapse was seen on the {plane}: {course}."
            ends = [first] if lowest is first else [first, lowest]
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, *ends),))
        if there >= (1 - _COLLAPSE) * before:
            text = (
                f"No collapse was seen on the {plane}: before the fit the complexity is lowest at {self._where(end)}, "
                f"{_f(there)}, after {_f(before)} at {self._where(first)}."
            )
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, first, end),))
        entropies = [_f(point.entropy) for point in (first, end)]
        text = (
            f"Collapse, until {self._where(end)}: representations have moved onto each other. On the {plane} the "
            f"complexity fell from {_f(before)} to {_f(there)}, and the entropy H(Z) of the layers went from "
            f"{entropies[0]} to {entropies[1]}."
        )
        if end is min(known, key=lambda p: self._value(p, complexity) or 0.0):
            text += (
                " It is the lowest complexity of the run: the most useless checkpoint is the most compressed one. "
                "Never choose a checkpoint by low complexity or small distance alone."
            )
        numbers = self._cite(complexity, first, end) + self._cite("entropy", first, end)
        return Sentence(topic="phases", text=text, numbers=(*numbers,))

    def _fitting(self, first: Measurement, last: Measurement, expressivity: str, plane: str) -> Sentence:
        phases = self._phases
        assert phases is not None
        start = self._steps.get(phases.fit_start) or first
        values = [_f(self._value(point, expressivity)) for point in (start, last)]
        seen = "" if phases.fit_recognised in (None, start.step) else f" (clear from step {phases.fit_recognised:,} on)"
        text = (
            f"Fitting, from {self._where(start)}{seen}: on the {plane} the expressivity, what is told of the next "
            f"token, was {values[0]} there and is {values[1]} at {self._where(last)}."
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
                f"{word} from {_f(self._value(top, name))} to {_f(self._value(last, name))}"
                for word, name in (("complexity", complexity), ("expressivity", expressivity))
            ]
            if phases.compression_start is not None:
                clear = phases.compression_recognised
                seen = "" if clear is None else f" (clear from step {clear:,} on)"
                text = f"Compression, from {self._where(top)}{seen}: on the {plane} {told[0]} in the end, {told[1]}."
            else:
                text = (
                    f"From {self._where(top)} on the {plane} goes down on both axes, {told[0]} in the end, {told[1]}: "
                    "the run leaves the bound, and this is not compression."
                )
            numbers = self._cite(complexity, top, last) + self._cite(expressivity, top, last)
            return Sentence(topic="phases", text=text, numbers=(*numbers,))
        since = [p for p in known if (p.step or 0) >= phases.fit_start]
        top = max(since, key=lambda p: self._value(p, complexity) or 0.0)
        if top is last:
            text = (
                f"No compression was recognised: on the {plane} the complexity is at its highest in the end, at "
                f"{self._where(top)}, {_f(self._value(top, complexity))}."
            )
            return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, top),))
        text = (
            f"No compression was recognised: since the fit the complexity on the {plane} is highest at "
            f"{self._where(top)}, {_f(self._value(top, complexity))}, and {_f(self._value(last, complexity))} in the "
            "end; "
        )
        text += (
            "a fall while a model memorises is not compression."
            if phases.memorising_start is not None
            else "this fall is not certain. Many small models never compress."
        )
        return Sentence(topic="phases", text=text, numbers=(*self._cite(complexity, top, last),))

    def _of_loss(self) -> Iterator[Sentence]:
        if not self._losses:
            why = self._points[-1].settings.get("loss")
            path = why.get("path") if isinstance(why, Mapping) else None
            because = f" ({path})" if isinstance(path, str) and path.startswith("none") else ""
            text = f"No held-out loss was measured{because}: {_NOTHING} on how good any point is."
            yield Sentence(topic="loss", text=text, numbers=(*self._cite("loss", self._points[-1]),))
            return
        lowest, last = self._lowest_loss(), self._losses[-1]
        if len(self._losses) == 1:
            text = f"The held-out loss is {_f(last.loss)} nats a token."
        elif lowest is last:
            first = self._losses[0]
            text = (
                f"The held-out loss is lowest at the last point, {self._where(last)}: {_f(last.loss)} nats a token, "
                f"after {_f(first.loss)} at {self._where(first)}."
            )
            lowest = first
        else:
            text = (
                f"The held-out loss is lowest at {self._where(lowest)}, {_f(lowest.loss)} nats a token, and "
                f"{_f(last.loss)} at the last point, {self._where(last)}."
            )
        numbers = self._cite("loss", *dict.fromkeys((lowest, last)))
        yield Sentence(topic="loss", text=text, numbers=(*numbers,))
        if last.bits_per_byte is not None:
            text = f"That is {_f(last.bits_per_byte)} bits a byte of text in the end, whatever the tokenizer."
            yield Sentence(topic="loss", text=text, numbers=(*self._cite("bits_per_byte", last),))

    def _lowest_loss(self) -> Measurement:
        return min(self._losses, key=lambda point: point.loss or 0.0)

    def _of_generalisation(self) -> Iterator[Sentence]:
        """Memorising, collapse and divergence, according to the rules for phases and for stopping."""
        phases, losses = self._phases, [point for point in self._losses if point.step is not None and point.scheduled]
        if phases is None or len(losses) < 2:
            return
        if self._all.rule.tolerance is None:
            text = f"The rule of the run does not look at the loss: {_NOTHING} on memorising or divergence."
            yield Sentence(topic="generalisation", text=text, numbers=(_whole("phase_rule.tolerance", None),))
            return
        tolerance = self._all.rule.tolerance
        lowest, last = min(losses, key=lambda p: p.loss or 0.0), losses[-1]
        above = (last.loss or 0.0) - (lowest.loss or 0.0)
        worse = next((n for n, p in enumerate(reversed(losses)) if (p.loss or 0) <= (lowest.loss or 0) + tolerance), 0)
        trained = [point.train_loss for point in (lowest, last)]
        numbers = self._cite("loss", lowest, last) if above else self._cite("loss", last)
        known = None not in trained
        if known:
            numbers += self._cite("train_loss", lowest, last)
        training = f", while the training loss went from {_f(trained[0])} to {_f(trained[1])}" if known else ""
        if phases.memorising_start is not None:
            numbers = [n for n in numbers if n.step is not None]
            text = (
                f"The model memorises since {self._where(self._steps[phases.memorising_start])}: the held-out loss is "
                f"{above:.2f} nats above its lowest{training or ', and the training loss is not known'}."
            )
        elif not worse:
            text = (
                f"Neither memorising nor divergence: the held-out loss ends {above:.3f} nats above its lowest, and "
                f"{tolerance:g} are tolerated{training}."
            )
        elif worse < PERSISTENCE:
            text = (
                f"The held-out loss is {above:.2f} nats above its lowest, but at the last {worse} points only, and "
                f"{PERSISTENCE} decide: {_NOTHING} on memorising or divergence{training}."
            )
        else:
            collapsed = phases.collapsed[next(n for n, point in enumerate(self._all) if point is last)]
            what = (
                "representations have collapsed"
                if collapsed
                else "it rises in fine-tuning on other text, which is to be expected, or overfits; which of the two, "
                "the probe cannot tell"
                if phases.trained
                else "training diverges"
            )
            text = f"The held-out loss is above its lowest for {worse} points, by {above:.2f} nats{training}: {what}."
        yield Sentence(topic="generalisation", text=text, numbers=(*numbers,))

    def _of_planes(self) -> Iterator[Sentence]:
        last = self._points[-1]
        primary = last.primary or "token"
        for view, whose in (("prediction", "the model's predictions"), ("readout", "the output embeddings")):
            yield self._view(view, whose, primary)
        if last.primary not in last.orders:
            return
        point = last.orders[primary]
        where = f"At {self._where(last)}" if last.step is not None else f"Of {self._where(last)}"
        local = [f"{primary}/{name}_local" for name in ("complexity", "expressivity", "optimality")]
        if point.complexity_local is not None:
            ratio = point.optimality_local
            text = (
                f"{where}, mean over layers, of the local context: complexity {_f(point.complexity_local)}, "
                f"expressivity {_f(point.expressivity_local)}, optimality {_f(ratio)}"
                f"{' (too little local complexity)' if ratio is None else ''}."
            )
            yield Sentence(topic="planes", text=text, numbers=(*(n for each in local for n in self._cite(each, last)),))
        plain = [f"{primary}/{name}" for name in ("complexity", "expressivity", "optimality")]
        text = (
            f"{where}, plain, at {primary}s: complexity {_f(point.complexity)}, expressivity {_f(point.expressivity)}, "
            f"optimality {_f(point.optimality)}."
        )
        numbers = [number for name in plain for number in self._cite(name, last)]
        if last.ceiling is not None:
            text = f"{text[:-1]}; any labelling could reach {_f(last.ceiling)} at most (the ceiling)."
            numbers += self._cite("ceiling", last)
        if point.complexity_null is None or point.expressivity_null is None:
            text += f" Without a null {_NOTHING} from these, because chance alone may give as much."
        else:
            nulls = ("complexity_null", "expressivity_null", "complexity_above_null", "expressivity_above_null")
            numbers += [number for name in nulls for number in self._cite(f"{primary}/{name}", last)]
            text += (
                f" The null is {_f(point.complexity_null)}, so that the truth lies between "
                f"{_f(point.complexity_above_null)} and {_f(point.complexity)} for complexity, "
                f"{_f(point.expressivity_above_null)} and {_f(point.expressivity)} for expressivity. Optimality above "
                f"the null: {_f(point.optimality_above_null)}."
            )
            numbers += self._cite(f"{primary}/optimality_above_null", last)
        yield Sentence(topic="planes", text=text, numbers=(*numbers,))

    def _view(self, view: str, whose: str, primary: str) -> Sentence:
        names = {name: f"{view}/{primary}/{name}_local" for name in ("complexity", "expressivity", "score")}
        known = self._having(names["expressivity"])
        if not known:
            why = self._points[-1].settings.get(view)
            why = why.get("why") if isinstance(why, Mapping) else None
            text = f"{_NOTHING.capitalize()} on the {view} plane: it was not measured{f' ({why})' if why else ''}."
            return Sentence(topic="planes", text=text, numbers=(*self._cite(names["expressivity"], self._points[-1]),))
        last = known[-1]
        complexity, expressivity, score = (self._value(last, name) for name in names.values())
        at = f", {self._where(last)}"
        text = (
            f"On the {view} plane (by {whose}){at}: local complexity {_f(complexity)}, expressivity "
            f"{_f(expressivity)}, score {_f(score)}"
        )
        text += " (too little local complexity)" if score is None else ""
        numbers = [number for name in names.values() for number in self._cite(name, last)]
        scored = self._having(names["score"])
        if len(scored) > 1:
            best = max(scored, key=lambda p: self._value(p, names["score"]) or 0.0)
            text += (
                "; the score is at its highest there"
                if best is last
                else f"; the score was highest at {self._where(best)}, {_f(self._value(best, names['score']))}"
            )
            numbers += self._cite(names["score"], best) if best is not last else []
        return Sentence(topic="planes", text=f"{text}.", numbers=(*numbers,))

    def _of_features(self) -> Iterator[Sentence]:
        last = self._points[-1]
        for name, feature in last.features.items():
            text = f"{name}: information {_f(feature.information)}, where labels at random have "
            text += f"{_f(feature.information_null)}"
            cited = ["information", "information_null"]
            chance = feature.information_p_value
            if chance is None:
                text += f"; without permutations {_NOTHING} on whether that is chance."
            else:
                cited.append("information_p_value")
                text += (
                    f"; not told from chance (p {chance:.2g}), so that {_NOTHING}."
                    if chance > CHANCE
                    else f"; told from chance (p {chance:.2g})."
                )
            if feature.ratio is not None:
                cited.append("ratio")
                text = f"{text[:-1]}. As a share of the complexity: {_f(feature.ratio)}."
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

    def _noise(self, name: str) -> Sentence:
        start = -1 if self._phases is None or self._phases.fit_start is None else self._phases.fit_start
        known = [p for p in self._having(name) if p.step is None or p.step >= start]
        having = known or self._having(name)
        # The last point with a known error, because the error of one point says nothing about another.
        last = next((p for p in reversed(having) if self._value(p, f"{name}_se") is not None), having[-1])
        steps = {p.step: p for p in known if p.step is not None and p.scheduled}
        noise = scatter([self._value(p, name) or 0.0 for p in steps.values()], [*steps])
        error = self._value(last, f"{name}_se")
        if noise is None and error is None:
            text = (
                f"How noisy {name} is cannot be told, from {len(steps)} points ({MIN_VALUES} are needed) and without "
                f"standard errors: {_NOTHING} from small differences."
            )
            return Sentence(topic="noise", text=text, numbers=(*self._cite(name, *(steps.values() or [last])),))
        parts, numbers = [], []
        if error is not None:
            where = f"At {self._where(last)}" if last.step is not None else f"Of {self._where(last)}"
            parts.append(
                f"{where}, {name} is {_f(self._value(last, name))}; over other probes of this size {name} varies by "
                f"{error:.2g} (standard error)."
            )
            numbers += self._cite(name, last) + self._cite(f"{name}_se", last)
        if noise is not None:
            least = _CLEAR * 2**0.5 * noise
            parts.append(
                f"One value of {name} scatters by {noise:.2g} about a smooth course, so that points that differ by "
                f"less than {least:.2g} are not told apart."
            )
            numbers += self._cite(name, *steps.values())
            values = [(self._value(p, name) or 0.0, p) for p in steps.values()]
            best = (min if name == "loss" else max)(values, key=lambda pair: pair[0])
            gap = abs(best[0] - values[-1][0])
            if best[1] is not values[-1][1]:
                parts.append(
                    f"The {'lowest' if name == 'loss' else 'highest'}, at {self._where(best[1])}, differs from the "
                    f"last by {gap:.2g}, {'beyond' if gap > least else 'within'} that."
                )
        return Sentence(topic="noise", text=" ".join(parts), numbers=(*numbers,))

    def _of_cost(self) -> Iterator[Sentence]:
        timed = [point for point in self._points if point.seconds is not None]
        if not timed:
            return
        seconds = [point.seconds or 0.0 for point in timed]
        number = f"{len(timed)} measurements took" if len(timed) > 1 else "The measurement took"
        each = f", {statistics.median(seconds):.1f} s each" if len(timed) > 1 else ""
        text = f"{number} {sum(seconds):.0f} s{each}"
        numbers = self._cite("seconds", *timed)
        share = timed[-1].overhead
        if share is not None:
            text += f"; with files and pictures {share:.1%} of the time of the run"
            numbers += self._cite("overhead", timed[-1])
        yield Sentence(topic="cost", text=f"{text}.", numbers=(*numbers,))

    def _of_conclusion(self) -> Iterator[Sentence]:
        if not self._points:
            why = "it has no points" if not self._all else f"none of its {len(self._all)} points could be measured"
            cited = self._cite("error", *self._failed) if self._failed else [_whole("points", 0)]
            yield Sentence(topic="conclusion", text=f"Nothing can be concluded: {why}.", numbers=(*cited,))
            return
        if not self._is_course:
            which = "one point" if len(self._points) == 1 else "these points"
            text = (
                f"{_NOTHING.capitalize()} on training from {which}; what can be done is to compare models on one probe."
            )
            yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("step", *self._ends()),))
            return
        if not self._losses:
            text = (
                f"{_NOTHING.capitalize()} on which point is the best: there is no loss, and no number of information "
                "has been found to order checkpoints as well as the loss does."
            )
            yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("loss", *self._ends()),))
            return
        tolerance = self._all.rule.tolerance or TOLERANCE
        lowest, last = self._lowest_loss(), self._losses[-1]
        equal = [p for p in self._losses if (p.loss or 0.0) <= (lowest.loss or 0.0) + tolerance]
        text = f"Let the loss choose: {self._where(lowest)} is the best point"
        others = [self._where(point) for point in equal if point is not lowest]
        if others:
            which = _listed(others) if len(others) < 3 else f"{len(others)} points from {others[0]} to {others[-1]}"
            text += (
                f", and as good as it, within {tolerance:g} nats: {which}. Information describes the course to it, and "
                "does not order these."
            )
        else:
            text += f", and no other is within {tolerance:g} nats of it."
        if lowest is last:
            text += " The loss was still at its lowest in the end: whether the model would go on learning is open."
        yield Sentence(topic="conclusion", text=text, numbers=(*self._cite("loss", *equal),))


def _whole(name: str, value: float | str | None) -> Number:
    """A number that belongs to the whole run."""
    return Number(name=name, step=None, point="the run", value=value)


def _reason(point: Measurement) -> str:
    reason = " ".join((point.error or "").split())
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 1]}…"
