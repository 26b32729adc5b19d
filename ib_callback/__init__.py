"""Measure complexity, expressivity and the distance to the Information Bottleneck bound of a model while it trains.

`__all__` lists the names that most users need. The other names here are return types and further functions.
"""

from ib_callback.bound.curve import IBCurve, ib_curve
from ib_callback.bound.probe_curve import probe_curve
from ib_callback.common.errors import ModelError as ModelError
from ib_callback.common.errors import ProbeError as ProbeError
from ib_callback.common.errors import RanksError as RanksError
from ib_callback.common.errors import RepresentationError as RepresentationError
from ib_callback.common.errors import TrajectoryError as TrajectoryError
from ib_callback.common.version import __version__ as __version__
from ib_callback.estimator.functional import soft_entropy, soft_mutual_information
from ib_callback.estimator.increment import Increment as Increment
from ib_callback.estimator.increment import information_increment as information_increment
from ib_callback.estimator.quantise import reference_points, soft_assign
from ib_callback.estimator.soft_histogram import SoftHistogram
from ib_callback.estimator.temperature import calibrated_temperature
from ib_callback.measuring.increments import model_increments as model_increments
from ib_callback.measuring.increments import ngram_labels as ngram_labels
from ib_callback.measuring.meter import Meter, measure
from ib_callback.measuring.meter import Preflight as Preflight
from ib_callback.probe.overlap import Overlap as Overlap
from ib_callback.probe.probe import Probe
from ib_callback.results.lines import Origin as Origin
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import Phase as Phase
from ib_callback.results.phases import PhaseRule
from ib_callback.results.phases import Phases as Phases
from ib_callback.results.points import FeaturePoint as FeaturePoint
from ib_callback.results.points import PlanePoint as PlanePoint
from ib_callback.results.results import Results
from ib_callback.results.selection import Candidate as Candidate
from ib_callback.results.selection import Choice as Choice
from ib_callback.results.selection import Selection
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.stopping import StopDecision as StopDecision
from ib_callback.results.stopping import StopReason as StopReason
from ib_callback.results.trajectory import Trajectory
from ib_callback.results.uncertainty import Adjusted as Adjusted
from ib_callback.results.uncertainty import Difference as Difference
from ib_callback.results.uncertainty import adjusted, difference
from ib_callback.results.uncertainty import adjusted_information as adjusted_information
from ib_callback.run.run import Run
from ib_callback.run.schedule import every, logarithmic

__all__ = [
    "IBCurve",
    "Measurement",
    "Meter",
    "PhaseRule",
    "PlateauStopping",
    "Probe",
    "Results",
    "Run",
    "Selection",
    "SoftHistogram",
    "Trajectory",
    "adjusted",
    "calibrated_temperature",
    "difference",
    "every",
    "ib_curve",
    "logarithmic",
    "measure",
    "probe_curve",
    "reference_points",
    "soft_assign",
    "soft_entropy",
    "soft_mutual_information",
]
