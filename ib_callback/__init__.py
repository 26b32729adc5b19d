"""Complexity, expressivity and distance to the Information Bottleneck bound of a model, while it trains."""

from ib_callback._version import __version__
from ib_callback.adjusted import Adjusted, adjusted, adjusted_information
from ib_callback.difference import Difference, difference
from ib_callback.errors import ModelError, ProbeError, RepresentationError, TrajectoryError
from ib_callback.estimator import soft_entropy, soft_mutual_information
from ib_callback.ib_curve import IBCurve, ib_curve
from ib_callback.increment import Increment, information_increment, ngram_labels
from ib_callback.measurement import Measurement
from ib_callback.meter import Meter, measure
from ib_callback.model_increments import model_increments
from ib_callback.overlap import Overlap
from ib_callback.phases import Phase, PhaseRule, Phases
from ib_callback.points import FeaturePoint, PlanePoint
from ib_callback.preflight import Preflight
from ib_callback.probe import Probe
from ib_callback.probe_joint import probe_curve
from ib_callback.quantise import reference_points, soft_assign
from ib_callback.schedule import every, logarithmic
from ib_callback.selection import Candidate, Choice, Selection
from ib_callback.soft_histogram import SoftHistogram
from ib_callback.stopping import PlateauStopping, StopDecision, StopReason
from ib_callback.temperature import calibrated_temperature
from ib_callback.trajectory import Trajectory

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
