"""The table of quantities: what each is, how it follows from what is measured, and which way is better.

Fields of the points, logged names, standard errors, forms above null, directions of rules, columns of tables and labels
of pictures are read from here. Fields are written out in points.py too, and a test compares them. A derived quantity
is an entry here, its fields there, its naive formula in tests/support/quantities.py and a line in docs/quantities.md.

All information quantities are efficiencies, i.e. fractions of log(num_bins). Complexity, expressivity, optimality and
distance to the bound are those of Conklin et al., ICLR 2026, and Conklin 2025. (E8 to E16 of docs/mathematics.md)
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]

# Below this a divisor is zero and a ratio to it means nothing. An information that is within the rounding error of its
# sums is 0 already where it is read out of them (measuring/readout.py).
NEGLIGIBLE = 1e-12
# A difference from a baseline below this many of its standard errors is not told apart from it.
SIGNIFICANT_STANDARD_ERRORS = 3.0
# What a formula may take beside quantities: the highest expressivity at the complexity of the point, …
BOUND = "bound"
# … the ceiling of the measurement, …
CEILING = "ceiling"
# … and, where no standard error is known, an upper estimate of that of a local complexity without meaning.
NOISE = "noise"


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A quantity as a function of others.

    Attributes:
        inputs: their names; derived ones come before it in the table.
        value: function of them, of numbers as of arrays, element by element.
        gradient: its partial derivatives, with which the errors of estimated baselines propagate.
        divisor: the input that it is divided by; it is undefined where that is negligible …
        resolved_by: … or, with the name of a standard error here, less than three of these: that of a baseline, or that
            of a quantity that comes before it, known where errors were asked for …
        else_by: … in place of which this is taken where they were not.
    """

    inputs: tuple[str, ...]
    value: Callable[..., Any]
    gradient: Callable[..., tuple[float, ...]]
    divisor: str | None = None
    resolved_by: str | None = None
    else_by: str | None = None

    def __call__(self, values: Mapping[str, float | None]) -> float | None:
        """The quantity, from values by name; None where it or an input is undefined."""
        given = [values.get(name) for name in self.inputs]
        if None in given:
            return None
        if self.divisor is not None:
            divisor = values[self.divisor] or 0.0
            if self.resolved_by is None:
                resolved = abs(divisor) >= NEGLIGIBLE
            else:
                error = values.get(self.resolved_by)
                error = values.get(self.else_by) if error is None and self.else_by else error
                resolved = error is not None and divisor >= max(SIGNIFICANT_STANDARD_ERRORS * error, NEGLIGIBLE)
            if not resolved:
                return None
        return self.value(*given)


def _difference(minuend: str, subtrahend: str) -> Formula:
    return Formula(inputs=(minuend, subtrahend), value=operator.sub, gradient=lambda _, __: (1.0, -1.0))


def _ratio(numerator: str, divisor: str, *, resolved_by: str | None = None, else_by: str | None = None) -> Formula:
    return Formula(
        inputs=(numerator, divisor),
        value=operator.truediv,
        gradient=lambda a, b: (1.0 / b, -(a / b) / b),
        divisor=divisor,
        resolved_by=resolved_by,
        else_by=else_by,
    )


def _scaled(information: str, baseline: str) -> Formula:
    """Of the room between a baseline and the ceiling; undefined where the ceiling is nothing."""
    return Formula(
        inputs=(information, baseline, CEILING),
        value=lambda i, b, c: None if b >= c else (i - b) / (1.0 - b / c),
        gradient=lambda i, b, c: (1.0 / (1.0 - b / c), (i / c - 1.0) / (1.0 - b / c) ** 2, 0.0),
        divisor=CEILING,
    )


@dataclass(frozen=True)
class Quantity:
    """One number.

    Attributes:
        name: of the field, and as logged (behind the order or the feature).
        definition: a sentence.
        kind: "layers": measured in each layer, field `<name>_by_layer`, and the mean taken; "baseline": estimated
            from the same sums, with its standard error beside it, in the mean over layers and in each; "error": such
            a standard error; "measured": any other number that is measured; "derived": by `formula`.
        formula: of a derived quantity.
        direction: whether low or high values are the better ones; None where neither are.
        has_error: whether groups of sequences can be left out of it, which gives a standard error, field and logged
            name `<name>_se`, where errors were asked for.
        bound: "any" if it depends on the bound, of which there is none for other orders than that of an IB curve;
            "curve" if it is defined for an IB curve alone, not for the diagonal. Logged where defined.
        primary: whether a measurement shows it as its own, of its primary order or of the whole, and pictures over
            steps have it.
        tabled: whether the table of a trajectory has it.
        viewed: whether it is logged of views, too: of the last layers, of averaged and of centred states.
        chance: what chance alone would give in its place.
        above_chance: the same number less what chance alone, or chance and the document, would give.
        beside: another quantity, drawn thinner beside it.
        drawn_of: views of which pictures over steps have it, where it was measured.
        label: on the axis of a picture over steps.
    """

    name: str
    definition: str
    _: KW_ONLY
    kind: Literal["layers", "baseline", "error", "measured", "derived"] = "derived"
    formula: Formula | None = None
    direction: Mode | None = None
    has_error: bool = False
    bound: Literal["any", "curve"] | None = None
    primary: bool = False
    tabled: bool = False
    viewed: bool = False
    chance: str = ""
    above_chance: tuple[str, ...] = ()
    beside: str = ""
    drawn_of: tuple[str, ...] = ()
    label: str = ""


# In the order of logging.
# fmt: off
PLANE = (
    Quantity(
        "complexity", "I(X;Z): what representations tell about the preceding tokens; mean over layers.",
        kind="layers", direction="min", has_error=True, primary=True, tabled=True, viewed=True,
        chance="complexity_null", above_chance=("complexity_above_null", "complexity_local"),
        beside="complexity_null", label="complexity I(X;Z)",
    ),
    Quantity(
        "expressivity", "I(Y;Z): what they tell about the following tokens; mean over layers.",
        kind="layers", direction="max", has_error=True, primary=True, tabled=True, viewed=True,
        chance="expressivity_null", above_chance=("expressivity_above_null", "expressivity_local"),
        beside="expressivity_null", label="expressivity I(Y;Z)",
    ),
    Quantity(
        "optimality", "Expressivity / complexity: 1 on the diagonal.",
        formula=_ratio("expressivity", "complexity"),
        direction="max", has_error=True, primary=True, tabled=True, viewed=True,
        chance="optimality_null", above_chance=("optimality_above_null", "optimality_local"),
        beside="optimality_above_null", label="optimality\n(expressivity / complexity)",
    ),
    Quantity(
        "distance_to_bound", "The bound at this complexity minus expressivity; the diagonal is the complexity itself.",
        formula=_difference(BOUND, "expressivity"), bound="any",
        direction="min", has_error=True, primary=True, tabled=True, viewed=True,
        chance="distance_null", above_chance=("distance_above_null", "distance_local"),
        label="distance to the bound\n({bound} − expressivity)",
    ),
    Quantity(
        "complexity_null", "Expected complexity when labels are permuted over positions: finite sampling alone.",
        kind="baseline",
    ),
    Quantity(
        "expressivity_null", "Expected expressivity when labels are permuted over positions.",
        kind="baseline",
    ),
    Quantity(
        "complexity_null_se", "Standard error of the estimate of complexity_null; 0 where it is exact.",
        kind="error",
    ),
    Quantity(
        "expressivity_null_se", "Standard error of the estimate of expressivity_null; 0 where it is exact.",
        kind="error",
    ),
    Quantity(
        "optimality_null", "Expressivity_null / complexity_null: what labels without meaning would give.",
        formula=_ratio("expressivity_null", "complexity_null"), tabled=True,
    ),
    Quantity(
        "distance_null", "Complexity_null - expressivity_null: to the diagonal, of labels without meaning.",
        formula=_difference("complexity_null", "expressivity_null"),
    ),
    Quantity(
        "complexity_above_null", "Complexity minus its null, a lower baseline.",
        formula=_difference("complexity", "complexity_null"), direction="min", has_error=True, tabled=True, viewed=True,
        above_chance=("complexity_local",),
    ),
    Quantity(
        "expressivity_above_null", "Expressivity minus its null, a lower baseline.",
        formula=_difference("expressivity", "expressivity_null"),
        direction="max", has_error=True, tabled=True, viewed=True,
        above_chance=("expressivity_local",),
    ),
    Quantity(
        "optimality_above_null",
        "The ratio of both above null; undefined within 3 standard errors of the complexity's null.",
        formula=_ratio("expressivity_above_null", "complexity_above_null", resolved_by="complexity_null_se"),
        direction="max", has_error=True, tabled=True, viewed=True,
        above_chance=("optimality_local",),
    ),
    Quantity(
        "distance_above_null", "Complexity minus expressivity, both above null: to the diagonal, whatever the bound.",
        formula=_difference("complexity_above_null", "expressivity_above_null"), direction="min", has_error=True,
        above_chance=("distance_local",),
    ),
    Quantity(
        "complexity_baseline", "Complexity of labels from far away in the same document.",
        kind="layers", has_error=True,
    ),
    Quantity(
        "expressivity_baseline", "Expressivity of labels from far away in the same document; one baseline serves both.",
        kind="layers", has_error=True,
    ),
    Quantity(
        "complexity_local", "Complexity above the document baseline, over the same positions: of the local context.",
        kind="layers", has_error=True, direction="min", viewed=True,
    ),
    Quantity(
        "expressivity_local", "Expressivity above the document baseline, over the same positions.",
        kind="layers", has_error=True, direction="max", viewed=True,
    ),
    Quantity(
        "optimality_local",
        "The ratio of both local ones; undefined if the complexity is within 3 standard errors of nothing.",
        formula=_ratio("expressivity_local", "complexity_local", resolved_by="complexity_local_se", else_by=NOISE),
        tabled=True, has_error=True, direction="max", viewed=True,
    ),
    Quantity(
        "distance_local", "1 - local optimality: the distance to the diagonal as a share of the local complexity.",
        formula=Formula(
            inputs=("optimality_local",), value=lambda ratio: 1.0 - ratio, gradient=lambda ratio: (-1.0,)
        ),
        has_error=True, direction="min", viewed=True,
    ),
    Quantity(
        "score_local", "Local expressivity squared / local complexity; undefined where their ratio is.",
        formula=Formula(
            inputs=("expressivity_local", "optimality_local"),
            value=operator.mul,
            gradient=lambda e, ratio: (ratio, e),
        ),
        has_error=True, direction="max", viewed=True,
        drawn_of=("readout", "prediction"), label="local score\n(expressivity² / complexity)",
    ),
    Quantity(
        "complexity_scaled", "(Complexity - baseline) / (1 - baseline / ceiling).",
        formula=_scaled("complexity", "complexity_baseline"), direction="min",
    ),
    Quantity(
        "expressivity_scaled", "(Expressivity - baseline) / (1 - baseline / ceiling).",
        formula=_scaled("expressivity", "expressivity_baseline"), direction="max",
    ),
    Quantity(
        "complexity_document", "The document baseline above the null: what the document says.",
        formula=_difference("complexity_baseline", "complexity_null"), has_error=True,
    ),
    Quantity(
        "expressivity_document", "The document baseline above the null of the trailing contexts.",
        formula=_difference("expressivity_baseline", "expressivity_null"), has_error=True,
    ),
    Quantity(
        "bound_ratio", "Expressivity / the bound at this complexity; with the diagonal that is the optimality.",
        formula=_ratio("expressivity", BOUND), bound="curve", direction="max",
        above_chance=("optimality_above_null", "optimality_local"),
    ),
)
FEATURE = (
    Quantity(
        "information", "I(F;Z): what representations tell about a feature label; mean over layers.",
        kind="layers", direction="max", has_error=True, chance="information_null",
    ),
    Quantity("information_null", "Mean of the information when labels are permuted.", kind="measured"),
    Quantity("information_null_std", "Its standard deviation when labels are permuted.", kind="measured"),
    Quantity(
        "information_p_value", "How often labels that say nothing look at least as informative; at least 1/101.",
        kind="measured",
    ),
    Quantity(
        "ratio", "Information / complexity of the primary order of the main probe.",
        formula=_ratio("information", "complexity"), direction="max",
    ),
    Quantity(
        "ratio_above_null", "The same with both above their nulls; undefined where the complexity is not resolved.",
        formula=Formula(
            inputs=("information", "information_null", "complexity_above_null"),
            value=lambda i, null, c: (i - null) / c,
            gradient=lambda i, null, c: (1.0 / c, -1.0 / c, -(i - null) / c / c),
            divisor="complexity_above_null",
            resolved_by="complexity_null_se",
        ),
        direction="max",
    ),
)
# Of a measurement as a whole.
WHOLE = (
    Quantity("entropy", "H(Z), mean over layers, in [0, 1].", kind="layers"),
    Quantity("ceiling", "The most that any labelling could reach, mean over layers.", kind="layers"),
    Quantity(
        "dispersion", "Mean cosine distance, 1 - cosine, of states at two different positions; mean over layers.",
        kind="layers",
    ),
    Quantity(
        "loss", "Mean next-token loss of the model on the probe; nats a token.",
        kind="measured", direction="min", primary=True, tabled=True, label="next-token loss\n(nats a token)",
    ),
    Quantity("loss_se", "Standard error of the loss, sequences being drawn.", kind="error"),
    Quantity(
        "bits_per_byte", "The loss of all predicted tokens in bits / the bytes of their text.",
        kind="measured", direction="min",
    ),
    Quantity(
        "predictive_information", "Plug-in entropy of the next token - loss; nats a token.",
        kind="measured", direction="max",
    ),
)
# Of the training, logged where it was told.
TRAINING = (
    Quantity(
        "train_loss", "Loss of the training at this step; nats a token, as a rule.",
        kind="measured", direction="min",
    ),
)
# fmt: on
# Names that a message lists where it has close ones to offer; a measurement has hundreds.
_SHOWN = 40
# Logged as well, but of no use to a rule.
BOOKKEEPING = ("seconds", "overhead", "tokens_seen")

PLANE_BY_NAME = {quantity.name: quantity for quantity in PLANE}
# The numbers of its primary order that a measurement shows as its own.
PRIMARY_SCALARS = tuple(quantity.name for quantity in PLANE if quantity.primary)
PLANE_SCALARS = tuple(PLANE_BY_NAME)
# Those of views.
VIEW_SCALARS = tuple(quantity.name for quantity in PLANE if quantity.viewed)
# Views that are measured by default: the last quarter of the layers, the last one, and those aimed at the output.
VIEWS = ("late", "last", "readout", "prediction")
# What is shown first of a measurement that has it: these numbers of this view, of the primary order. The rule of the
# validation study chose the first of them among all candidates (docs/evidence.md).
FIRST_VIEW = "prediction"
FIRST_SHOWN = ("score_local", "complexity_local", "expressivity_local")
FEATURE_SCALARS = tuple(quantity.name for quantity in FEATURE)
# Standard errors, which are logged where they were asked for.
PLANE_ERRORS, FEATURE_ERRORS = (
    tuple(f"{quantity.name}_se" for quantity in table if quantity.has_error) for table in (PLANE, FEATURE)
)
_DIRECTIONS = {quantity.name: quantity.direction for quantity in (*TRAINING, *WHOLE, *FEATURE, *PLANE)}


def derived(table: Iterable[Quantity], measured: Mapping[str, float | None]) -> dict[str, Any]:
    """Every quantity of a table, from those measured and what else its formulas take.

    Those of an IB curve are undefined: a curve comes later, if at all (`PlanePoint.against`).
    """
    values = dict(measured)
    for quantity in table:
        if quantity.formula is not None and quantity.bound != "curve":
            values[quantity.name] = quantity.formula(values)
    return {quantity.name: values.get(quantity.name) for quantity in table}


def chance_of(name: str, *, primary: str | None, bound: str) -> str | None:
    """The number that chance alone would give in the place of another, by the names of the log; None: there is none.

    >>> chance_of("optimality", primary="token", bound="diagonal")
    'token/optimality_null'
    >>> chance_of("preference/information", primary="token", bound="diagonal")
    'preference/information_null'
    """
    where, _, plain = name.rpartition("/")
    quantity = PLANE_BY_NAME.get(plain) or next((each for each in FEATURE if each.name == plain), None)
    if quantity is None or not quantity.chance or (quantity.bound and bound != "diagonal"):
        return None
    where = where or primary or ""
    return f"{where}/{quantity.chance}" if where else None


def is_unresolved(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a number of an order is undefined although all was measured that it follows from: a ratio to nothing."""
    quantity = PLANE_BY_NAME.get(name)
    if quantity is None or quantity.formula is None or values.get(name) is not None:
        return False
    return all(values.get(each) is not None or is_unresolved(each, values) for each in quantity.formula.inputs)


def plane_scalars(order: str, *, primary: str | None, bound: str) -> tuple[str, ...]:
    """Those of `PLANE_SCALARS` that are defined for an order with such a bound.

    >>> "distance_to_bound" in plane_scalars("bigram", primary="token", bound="ib_curve")
    False
    """
    undefined: tuple[str, ...] = ("curve",) if bound == "diagonal" else () if order == primary else ("any", "curve")
    return tuple(quantity.name for quantity in PLANE if quantity.bound not in undefined)


def view_scalars(order: str, *, primary: str | None, bound: str) -> tuple[str, ...]:
    """Those of `VIEW_SCALARS` that are defined for an order with such a bound."""
    return tuple(name for name in plane_scalars(order, primary=primary, bound=bound) if name in VIEW_SCALARS)


def metric_names(
    orders: Iterable[str],
    features: Iterable[str] = (),
    *,
    primary: str | None = None,
    bound: str = "diagonal",
    views: Iterable[str] = VIEWS,
    without: Iterable[str] = (),
) -> list[str]:
    """Every metric of measurements with these orders and features, before one is made.

    Args:
        orders: that are measured.
        features: likewise.
        primary: the primary order; the IB curve is the bound of that one alone.
        bound: as for `Meter`.
        views: names of the views (measuring/views.py).
        without: quantities that are not measured; what follows from them is not there either.

    >>> names = metric_names(["token"], ["preference"])
    >>> names[:4], names[-2:]
    (['complexity', 'expressivity', 'optimality', 'distance_to_bound'],
     ['preference/ratio', 'preference/ratio_above_null'])
    """
    orders = list(orders)
    views = list(views) if orders else []
    scalars = {order: view_scalars(order, primary=primary, bound=bound) for order in orders}
    names = [
        *PRIMARY_SCALARS, *(quantity.name for quantity in WHOLE),
        *(f"{order}/{name}" for order in orders for name in plane_scalars(order, primary=primary, bound=bound)),
        *(f"{view}/{name}" for view in views for name in PRIMARY_SCALARS),
        *(f"{view}/{order}/{name}" for view in views for order in orders for name in scalars[order]),
        *(f"{feature}/{name}" for feature in features for name in FEATURE_SCALARS),
    ]  # fmt: skip
    missing = {*without}
    for quantity in (*PLANE, *FEATURE):
        if quantity.formula is not None and missing.intersection(quantity.formula.inputs):
            missing.add(quantity.name)
    return [name for name in names if name.rpartition("/")[2] not in missing]


def spelled(name: str, available: Iterable[str]) -> str | None:
    """The name of a number among those that exist, however a logger spells it; None: there is no such number.

    Loggers put `ib/` in front, and HuggingFace's Trainer writes `_` for `/` and perhaps `eval_` in front.

    >>> numbers = ["optimality", "token/complexity_null"]
    >>> [spelled(name, numbers) for name in ("optimality", "ib/optimality", "eval_ib_token_complexity_null")]
    ['optimality', 'optimality', 'token/complexity_null']
    """
    names = list(available)
    plain = without_prefix(name)
    for candidate in (name, plain):
        if candidate in names:
            return candidate
    if plain == name:
        return None
    flat = plain.replace("/", "_")
    return next((other for other in names if other.replace("/", "_") == flat), None)


def without_prefix(name: str) -> str:
    """A name without what loggers put in front of it; of a name that has nothing in front, itself."""
    short = name.removeprefix("eval_")
    return next((short[len(prefix) :] for prefix in ("ib/", "ib_") if short.startswith(prefix)), name)


def feature_of(name: str, features: Iterable[str]) -> str | None:
    """The feature that a metric is of, however a logger spells it; None if it is of none of these.

    >>> [feature_of(name, ["preference"]) for name in ("preference", "ib/preference/ratio", "eval_ib_preference_ratio")]
    ['preference', 'preference', 'preference']
    >>> feature_of("preferences/ratio", ["preference"])
    """
    plain = without_prefix(name)
    ends = ("/",) if plain == name or "/" in plain else ("/", "_")
    return next((f for f in features if plain == f or plain.startswith(tuple(f + end for end in ends))), None)


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """The end of a message on a name that does not exist: names that are close, or nothing.

    >>> did_you_mean("optimallity", ["optimality", "complexity"])
    '. Did you mean optimality?'
    """
    close = difflib.get_close_matches(without_prefix(name), list(available), n=3)
    return f". Did you mean {' or '.join(close)}?" if close else ""


def resolve_metric(name: str, available: Iterable[str]) -> str:
    """The full name of a metric: `"preference"`, a feature, stands for `"preference/information"`.

    Args:
        name: as logged, with or without a logger's prefix; see `spelled`.
        available: the names that exist.

    Raises:
        ValueError: there is no such metric; the message names those that are close, and lists those that exist, of
            hundreds the first.
    """
    names = list(available)
    for candidate in (name, f"{name}/information"):
        full = spelled(candidate, names)
        if full is not None:
            return full
    plain = without_prefix(name)
    hint, view, last = "", plain.partition("/")[0], plain.rpartition("/")[2]
    quantity = PLANE_BY_NAME.get(last)
    if view in ("readout", "prediction") and not any(other.startswith(f"{view}/") for other in names):
        hint = f"; {view}/… takes {view}=True, which no preset has"
    elif quantity is not None and quantity.bound:
        hint = '; a bound_ratio takes bound="ib_curve", which is the bound of the primary order and of no other'
    elif last in _DIRECTIONS and not any(other.rpartition("/")[2] == last for other in names):
        hint = (
            f'; {last} may take loss=True, null=True, baseline=True, weighting="empirical" (no preset has these), '
            "sequences of at least 48 valid positions (what is local), or Probe.num_bytes (bits per byte)"
        )
    close = did_you_mean(name, names)
    shown = [*names[:_SHOWN], f"… ({len(names)} in all)"] if len(names) > _SHOWN else names
    those = f"those measured: {', '.join(shown) or 'none'}{close}"
    raise ValueError(f"no metric {name!r} is measured{hint}; {those}")


def better_direction(name: str) -> Mode | None:
    """Whether high or low values of a metric are the better ones; None where neither is.

    A name without any `/` that is no metric is taken for that of a feature. Spellings are those of `spelled`.

    >>> [better_direction(name) for name in ("ib/distance_to_bound", "eval_ib_bigram_distance_to_bound", "preference")]
    ['min', 'min', 'max']
    """
    plain = without_prefix(name)
    last = plain.rpartition("/")[2]
    if plain != name and "/" not in plain and plain not in _DIRECTIONS:
        # As HuggingFace's Trainer spells "bigram/distance_to_bound".
        ends = [known for known in _DIRECTIONS if plain.endswith(f"_{known}")]
        last = max(ends, key=len, default=plain)
    return _DIRECTIONS.get(last, None if "/" in plain else "max")


def check_direction(mode: str | None) -> None:
    """Raise a ValueError unless mode is "min" or "max"."""
    if mode not in ("min", "max"):
        raise ValueError(f'mode must be "min" (low values are better) or "max", got {mode!r}')


def check_metric(argument: str, name: object) -> None:
    """Raise a TypeError unless the name of a metric is a text."""
    if not isinstance(name, str):
        raise TypeError(f'{argument}: expected the name of a metric, such as "optimality", got {name!r}')
