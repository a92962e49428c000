"""What flows through a pipeline, and the promises its parts make."""

from weighting.contract.collectives import Alone as Alone
from weighting.contract.collectives import Collectives as Collectives
from weighting.contract.levels import Groups as Groups
from weighting.contract.levels import Level as Level
from weighting.contract.levels import Within as Within
from weighting.contract.scope import Scope as Scope
from weighting.contract.scope import ScopeWithin as ScopeWithin
from weighting.contract.signals import Signals as Signals
from weighting.contract.stage import Combine as Combine
from weighting.contract.stage import Constrain as Constrain
from weighting.contract.stage import DeferredScale as DeferredScale
from weighting.contract.stage import Feedback as Feedback
from weighting.contract.stage import Form as Form
from weighting.contract.stage import Pool as Pool
from weighting.contract.stage import Shape as Shape
from weighting.contract.stage import Source as Source
from weighting.contract.stage import Stage as Stage
from weighting.contract.stage import Sugar as Sugar
from weighting.contract.stage import Weigh as Weigh
