"""Complexity, expressivity and distance to the Information Bottleneck bound of a model, while it trains."""

from ib_callback.bound.curve import IBCurve, ib_curve
from ib_callback.bound.probe_curve import probe_curve
from ib_callback.common.errors import ModelError, ProbeError, RepresentationError, TrajectoryError
from ib_callback.common.version import __version__
from ib_callback.estimator.functional import soft_entropy, soft_mutual_information
from ib_callback.estimator.increment import Increment, information_increment
from ib_callback.estimator.quantise import reference_points, soft_assign
from ib_callback.estimator.soft_histogram import SoftHistogram
from ib_callback.estimator.temperature import calibrated_temperature
from ib_callback.measuring.increments import model_increments, ngram_labels
from ib_callback.measuring.meter import Meter, Preflight, measure
from ib_callback.probe.overlap import Overlap
from ib_callback.probe.probe import Probe
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import Phase, PhaseRule, Phases
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.selection import Candidate, Choice, Selection
from ib_callback.results.stopping import PlateauStopping, StopDecision, StopReason
from ib_callback.results.trajectory import Trajectory
from ib_callback.results.uncertainty import Adjusted, Difference, adjusted, adjusted_information, difference
from ib_callback.run.run import Run
from ib_callback.run.schedule import every, logarithmic

__all__ = [
    "Adjusted",
    "Candidate",
    "Choice",
    "Difference",
    "FeaturePoint",
    "IBCurve",
    "Increment",
    "Measurement",
    "Meter",
    "ModelError",
    "Overlap",
    "Phase",
    "PhaseRule",
    "Phases",
    "PlanePoint",
    "PlateauStopping",
    "Preflight",
    "Probe",
    "ProbeError",
    "RepresentationError",
    "Run",
    "Selection",
    "SoftHistogram",
    "StopDecision",
    "StopReason",
    "Trajectory",
    "TrajectoryError",
    "__version__",
    "adjusted",
    "adjusted_information",
    "calibrated_temperature",
    "difference",
    "every",
    "ib_curve",
    "information_increment",
    "logarithmic",
    "measure",
    "model_increments",
    "ngram_labels",
    "probe_curve",
    "reference_points",
    "soft_assign",
    "soft_entropy",
    "soft_mutual_information",
]
