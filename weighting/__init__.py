"""A language for deciding how much each token's gradient counts."""

from weighting.build import Weighting as Weighting
from weighting.build import Weights as Weights
from weighting.build import build as build
from weighting.contract import Constrain as Constrain
from weighting.contract import Groups as Groups
from weighting.contract import Pool as Pool
from weighting.contract import Scope as Scope
from weighting.contract import Shape as Shape
from weighting.contract import Signals as Signals
from weighting.contract import Source as Source
from weighting.contract import Stage as Stage
from weighting.contract import Weigh as Weigh
from weighting.contract.levels import documents as documents
from weighting.errors import NonFiniteSignalError as NonFiniteSignalError
from weighting.errors import OneUnitWarning as OneUnitWarning
from weighting.errors import SpecError as SpecError
from weighting.language.read import load as load
from weighting.language.read import loads as loads
from weighting.loss.cross_entropy import weighted_cross_entropy as weighted_cross_entropy
from weighting.loss.linear import linear_weighted_cross_entropy as linear_weighted_cross_entropy
from weighting.registry import stage as stage
from weighting.schedules import NonNegativeNumber as NonNegativeNumber
from weighting.schedules import Number as Number
from weighting.schedules import PositiveNumber as PositiveNumber
from weighting.schedules import UnitNumber as UnitNumber
from weighting.simulate import simulate as simulate
from weighting.spec import Spec as Spec
from weighting.spec import dumps as dumps

__version__ = "0.1.0"
