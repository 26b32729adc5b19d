"""The table of quantities: what each one is, how it follows from measured numbers, and which direction is better.

Fields of the points, logged names, standard errors, forms above null, directions of rules, columns of tables and labels
of pictures are read from this table. points.py lists the fields again, and a test compares them. To add a derived
quantity, add an entry here, its fields there, its naive formula in tests/support/quantities.py and a line in
docs/quantities.md.

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

# A divisor below this counts as zero, and a ratio to it means nothing. Information within the rounding error of its
# sums has already been set to 0 (measuring/readout.py).
NEGLIGIBLE = 1e-12
# A difference from a baseline of less than this many of its standard errors does not count as a difference.
SIGNIFICANT_STANDARD_ERRORS = 3.0
# Inputs of formulas that are not quantities. The highest expressivity at the complexity of the point:
BOUND = "bound"
# The ceiling of the measurement:
CEILING = "ceiling"
# If no standard error is known: an upper estimate of that of the local complexity, for labels that say nothing:
NOISE = "noise"


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A quantity as a function of others.

    Attributes:
        inputs: names of the inputs; derived inputs come earlier in the table.
        value: function of the inputs, for numbers and, element by element, for arrays.
        gradient: partial derivatives of that function; they propagate the errors of estimated baselines.
        divisor: the input that is the divisor. If it is negligible, the quantity is undefined.
        resolved_by: name of a standard error. If the divisor is less than three of these, the quantity is undefined. It
            is the error of a baseline, or of an earlier quantity, which is known only if standard errors were measured.
        else_by: name of the number that replaces `resolved_by` if standard errors were not measured.
    """

    inputs: tuple[str, ...]
    value: Callable[..., Any]
    gradient: Callable[..., tuple[float, ...]]
    divisor: str | None = None
    resolved_by: str | None = None
    else_by: str | None = None

    def __call__(self, values: Mapping[str, float | None]) -> float | None:
        """Compute the quantity from values by name; None if it or an input is undefined."""
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
    """Information scaled by the room between a baseline and the ceiling; undefined if the ceiling is negligible."""
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
        name: name of the field, and last part of the logged name (after the order or the feature).
        definition: a sentence that defines it.
        kind: "layers": measured in each layer, field `<name>_by_layer`, and averaged over layers; "baseline": estimated
            from the same sums, as a mean over layers and in each layer, with a standard error; "error": such a standard
            error; "measured": any other measured number; "derived": computed by `formula`.
        formula: formula of a derived quantity.
        direction: whether low or high values are better; None if neither is.
        has_error: whether groups of sequences can be left out of it. If errors are measured, it then has a standard
            error, with the field and logged name `<name>_se`.
        bound: "any" if it depends on the bound (an IB curve is the bound of one order only); "curve" if it is defined
            only for an IB curve, not for the diagonal. It is logged where it is defined.
        primary: whether it is an attribute of a measurement, for its primary order or as a whole, and appears in
            pictures over steps.
        tabled: whether the table of a trajectory has it.
        viewed: whether it is also logged for views: of the last layers, of averaged and of centred states.
        chance: the quantity that chance alone would give in its place.
        above_chance: the same quantity minus what chance alone, or chance and the document, would give.
        beside: another quantity that pictures draw as a thinner line beside it.
        drawn_of: views for which pictures over steps show it, if measured.
        label: label on the axis of a picture over steps.
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
        "expressivity", "I(Y;Z): what representations tell about the following tokens; mean over layers.",
        kind="layers", direction="max", has_error=True, primary=True, tabled=True, viewed=True,
        chance="expressivity_null", above_chance=("expressivity_above_null", "expressivity_local"),
        beside="expressivity_null", label="expressivity I(Y;Z)",
    ),
    Quantity(
        "optimality", "Expressivity / complexity. It is 1 on the diagonal.",
        formula=_ratio("expressivity", "complexity"),
        direction="max", has_error=True, primary=True, tabled=True, viewed=True,
        chance="optimality_null", above_chance=("optimality_above_null", "optimality_local"),
        beside="optimality_above_null", label="optimality\n(expressivity / complexity)",
    ),
    Quantity(
        "distance_to_bound",
        "The bound at this complexity, minus expressivity. With the diagonal, the bound is the complexity itself.",
        formula=_difference(BOUND, "expressivity"), bound="any",
        direction="min", has_error=True, primary=True, tabled=True, viewed=True,
        chance="distance_null", above_chance=("distance_above_null", "distance_local"),
        label="distance to the bound\n({bound} − expressivity)",
    ),
    Quantity(
        "complexity_null",
        "Expected complexity when labels are permuted over positions: what finite sampling alone gives.",
        kind="baseline",
    ),
    Quantity(
        "expressivity_null",
        "Expected expressivity when labels are permuted over positions: what finite sampling alone gives.",
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
        "distance_null",
        "Complexity_null - expressivity_null: the distance to the diagonal that labels without meaning have.",
        formula=_difference("complexity_null", "expressivity_null"),
    ),
    Quantity(
        "complexity_above_null", "Complexity minus its null: a low estimate of the true value.",
        formula=_difference("complexity", "complexity_null"), direction="min", has_error=True, tabled=True, viewed=True,
        above_chance=("complexity_local",),
    ),
    Quantity(
        "expressivity_above_null", "Expressivity minus its null: a low estimate of the true value.",
        formula=_difference("expressivity", "expressivity_null"),
        direction="max", has_error=True, tabled=True, viewed=True,
        above_chance=("expressivity_local",),
    ),
    Quantity(
        "optimality_above_null",
        "Ratio of the two numbers above null; undefined if the complexity is within 3 standard errors of its null.",
        formula=_ratio("expressivity_above_null", "complexity_above_null", resolved_by="complexity_null_se"),
        direction="max", has_error=True, tabled=True, viewed=True,
        above_chance=("optimality_local",),
    ),
    Quantity(
        "distance_above_null",
        "Complexity minus expressivity, both above null: the distance to the diagonal, for any bound.",
        formula=_difference("complexity_above_null", "expressivity_above_null"), direction="min", has_error=True,
        above_chance=("distance_local",),
    ),
    Quantity(
        "complexity_baseline", "Complexity of labels from far away in the same document.",
        kind="layers", has_error=True,
    ),
    Quantity(
        "expressivity_baseline", "The same value as complexity_baseline: one set of labels from far away serves both.",
        kind="layers", has_error=True,
    ),
    Quantity(
        "complexity_local",
        "Complexity minus the document baseline, over the same positions: what the local context adds.",
        kind="layers", has_error=True, direction="min", viewed=True,
    ),
    Quantity(
        "expressivity_local", "Expressivity minus the document baseline, over the same positions.",
        kind="layers", has_error=True, direction="max", viewed=True,
    ),
    Quantity(
        "optimality_local",
        "Ratio of the two local numbers; undefined if the local complexity is within 3 standard errors of zero.",
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
        "score_local",
        "Local expressivity squared / local complexity; undefined where the local optimality is undefined.",
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
        "complexity_document", "The document baseline minus the complexity null: what the document alone tells.",
        formula=_difference("complexity_baseline", "complexity_null"), has_error=True,
    ),
    Quantity(
        "expressivity_document", "The document baseline minus the expressivity null.",
        formula=_difference("expressivity_baseline", "expressivity_null"), has_error=True,
    ),
    Quantity(
        "bound_ratio", "Expressivity / the bound at this complexity. With the diagonal, this is the optimality.",
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
    Quantity(
        "information_null_std", "Standard deviation of the information when labels are permuted.", kind="measured",
    ),
    Quantity(
        "information_p_value", "How often labels without meaning look at least as informative; at least 1/101.",
        kind="measured",
    ),
    Quantity(
        "ratio", "Information / complexity of the primary order of the main probe.",
        formula=_ratio("information", "complexity"), direction="max",
    ),
    Quantity(
        "ratio_above_null",
        "The same ratio with both numbers above null; undefined if the complexity is within 3 standard "
        "errors of its null.",
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
# Quantities of a measurement as a whole.
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
    Quantity("loss_se", "Standard error of the loss for a random draw of sequences.", kind="error"),
    Quantity(
        "bits_per_byte", "Loss of all predicted tokens in bits, divided by the number of bytes of their text.",
        kind="measured", direction="min",
    ),
    Quantity(
        "predictive_information", "Plug-in entropy of the next token, minus the loss; nats a token.",
        kind="measured", direction="max",
    ),
)
# Quantities of the training, logged if known.
TRAINING = (
    Quantity(
        "train_loss", "Training loss at this step; usually in nats a token.",
        kind="measured", direction="min",
    ),
)
# fmt: on
# Largest number of names in a message that already names close ones; a measurement has hundreds.
_SHOWN = 40
# Logged too, but useless for rules.
BOOKKEEPING = ("seconds", "overhead", "tokens_seen")

PLANE_BY_NAME = {quantity.name: quantity for quantity in PLANE}
# Numbers of the primary order that are attributes of a measurement.
PRIMARY_SCALARS = tuple(quantity.name for quantity in PLANE if quantity.primary)
PLANE_SCALARS = tuple(PLANE_BY_NAME)
# Numbers that are logged for views.
VIEW_SCALARS = tuple(quantity.name for quantity in PLANE if quantity.viewed)
# Views that are measured by default: the last quarter of the layers, the last layer, and the two views of the output.
VIEWS = ("late", "last", "readout", "prediction")
# Numbers that are shown first if a measurement has them: these numbers of this view, for the primary order. The rule of
# the validation study chose the first of them among all candidates (docs/evidence.md).
FIRST_VIEW = "prediction"
FIRST_SHOWN = ("score_local", "complexity_local", "expressivity_local")
FEATURE_SCALARS = tuple(quantity.name for quantity in FEATURE)
# Standard errors, which are logged if they were requested.
PLANE_ERRORS, FEATURE_ERRORS = (
    tuple(f"{quantity.name}_se" for quantity in table if quantity.has_error) for table in (PLANE, FEATURE)
)
_DIRECTIONS = {quantity.name: quantity.direction for quantity in (*TRAINING, *WHOLE, *FEATURE, *PLANE)}


def derived(table: Iterable[Quantity], measured: Mapping[str, float | None]) -> dict[str, Any]:
    """Compute every quantity of a table from the measured ones and the other inputs of formulas.

    Quantities of an IB curve stay undefined; a curve is added later, if at all (`PlanePoint.against`).
    """
    values = dict(measured)
    for quantity in table:
        if quantity.formula is not None and quantity.bound != "curve":
            values[quantity.name] = quantity.formula(values)
    return {quantity.name: values.get(quantity.name) for quantity in table}


def chance_of(name: str, *, primary: str | None, bound: str) -> str | None:
    """The logged name of the number that chance alone would give in place of `name`; None if there is none.

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
    """Whether a number of an order is undefined although its inputs were measured: a ratio to a negligible number."""
    quantity = PLANE_BY_NAME.get(name)
    if quantity is None or quantity.formula is None or values.get(name) is not None:
        return False
    return all(values.get(each) is not None or is_unresolved(each, values) for each in quantity.formula.inputs)


def plane_scalars(order: str, *, primary: str | None, bound: str) -> tuple[str, ...]:
    """The names in `PLANE_SCALARS` that are defined for an order with this bound.

    >>> "distance_to_bound" in plane_scalars("bigram", primary="token", bound="ib_curve")
    False
    """
    undefined: tuple[str, ...] = ("curve",) if bound == "diagonal" else () if order == primary else ("any", "curve")
    return tuple(quantity.name for quantity in PLANE if quantity.bound not in undefined)


def view_scalars(order: str, *, primary: str | None, bound: str) -> tuple[str, ...]:
    """The names in `VIEW_SCALARS` that are defined for an order with this bound."""
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
    """Every metric that measurements with these orders and features will have.

    Args:
        orders: the measured orders.
        features: the measured features.
        primary: the primary order; the IB curve is the bound of this order only.
        bound: as for `Meter`.
        views: names of the views (measuring/views.py).
        without: quantities that are not measured; numbers that depend on them are left out too.

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
    """The name of an existing number, for any spelling that loggers use; None if there is no such number.

    Loggers put `ib/` in front. HuggingFace's Trainer writes `_` instead of `/`, and may put `eval_` in front.

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
    """A name without the prefix of a logger; a name without a prefix is unchanged."""
    short = name.removeprefix("eval_")
    return next((short[len(prefix) :] for prefix in ("ib/", "ib_") if short.startswith(prefix)), name)


def feature_of(name: str, features: Iterable[str]) -> str | None:
    """The feature to which a metric belongs, for any spelling that loggers use; None if it belongs to none of these.

    >>> [feature_of(name, ["preference"]) for name in ("preference", "ib/preference/ratio", "eval_ib_preference_ratio")]
    ['preference', 'preference', 'preference']
    >>> feature_of("preferences/ratio", ["preference"])
    """
    plain = without_prefix(name)
    ends = ("/",) if plain == name or "/" in plain else ("/", "_")
    return next((f for f in features if plain == f or plain.startswith(tuple(f + end for end in ends))), None)


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """The end of a message about an unknown name: a suggestion of similar names, or empty.

    >>> did_you_mean("optimallity", ["optimality", "complexity"])
    '. Did you mean optimality?'
    """
    close = difflib.get_close_matches(without_prefix(name), list(available), n=3)
    return f". Did you mean {' or '.join(close)}?" if close else ""


def resolve_metric(name: str, available: Iterable[str]) -> str:
    """The full name of a metric: `"preference"`, a feature, stands for `"preference/information"`.

    Args:
        name: the name as logged, with or without a logger's prefix; see `spelled`.
        available: the existing names.

    Raises:
        ValueError: there is no such metric. The message suggests similar names and lists existing ones, at most the
            first 40 if there are hundreds.
    """
    names = list(available)
    for candidate in (name, f"{name}/information"):
        full = spelled(candidate, names)
        if full is not None:
            return full
    plain = without_prefix(name)
    hint, view = "", plain.partition("/")[0]
    order, _, last = plain.rpartition("/")
    quantity = PLANE_BY_NAME.get(last)
    if view in ("readout", "prediction") and not any(other.startswith(f"{view}/") for other in names):
        hint = f". {view}/… needs {view}=True and no preset"
    elif quantity is not None and quantity.bound == "curve":
        hint = f'. {last} needs bound="ib_curve", and exists for the primary order only'
    elif quantity is not None and quantity.bound and any(other.startswith(f"{order}/") for other in names):
        hint = f'. With bound="ib_curve", {last} exists for the primary order only'
    elif last in _DIRECTIONS and not any(other.rpartition("/")[2] == last for other in names):
        hint = (
            f'. {last} may need loss=True, null=True, baseline=True or weighting="empirical", and no preset. '
            "Local numbers also need sequences of at least 48 valid positions, and bits_per_byte needs Probe.num_bytes"
        )
    close = did_you_mean(name, names)
    shown = [*names[:_SHOWN], f"… ({len(names)} in all)"] if len(names) > _SHOWN else names
    those = f"Measured metrics: {', '.join(shown) or 'none'}{close}"
    raise ValueError(f"no metric {name!r} is measured{hint}. {those}")


def better_direction(name: str) -> Mode | None:
    """Whether high or low values of a metric are better; None if neither is.

    An unknown name without `/` is taken as the name of a feature. Spellings are those of `spelled`.

    >>> [better_direction(name) for name in ("ib/distance_to_bound", "eval_ib_bigram_distance_to_bound", "preference")]
    ['min', 'min', 'max']
    """
    plain = without_prefix(name)
    last = plain.rpartition("/")[2]
    if plain != name and "/" not in plain and plain not in _DIRECTIONS:
        # HuggingFace's Trainer writes "bigram/distance_to_bound" as "bigram_distance_to_bound".
        ends = [known for known in _DIRECTIONS if plain.endswith(f"_{known}")]
        last = max(ends, key=len, default=plain)
    return _DIRECTIONS.get(last, None if "/" in plain else "max")


def check_direction(mode: str | None) -> None:
    """Raise a ValueError unless `mode` is "min" or "max"."""
    if mode not in ("min", "max"):
        raise ValueError(f'mode must be "min" (low values are better) or "max", got {mode!r}')


def check_metric(argument: str, name: object) -> None:
    """Raise a TypeError unless the name of a metric is a string."""
    if not isinstance(name, str):
        raise TypeError(f'{argument}: expected the name of a metric, such as "optimality", got {name!r}')
