"""The stages that ship with the language; importing this package registers them."""

from weighting.stages.abs import Abs as Abs
from weighting.stages.affine import Affine as Affine
from weighting.stages.clamp import Clamp as Clamp
from weighting.stages.clip import Clip as Clip
from weighting.stages.entropy import Entropy as Entropy
from weighting.stages.extremes import Extremes as Extremes
from weighting.stages.floor import Floor as Floor
from weighting.stages.focal import Focal as Focal
from weighting.stages.interpolate import Interpolate as Interpolate
from weighting.stages.linupper import LinUpper as LinUpper
from weighting.stages.loss import Loss as Loss
from weighting.stages.mean_one import MeanOne as MeanOne
from weighting.stages.mean_one import TokenScale as TokenScale
from weighting.stages.normalize import Normalize as Normalize
from weighting.stages.pools import Max as Max
from weighting.stages.pools import Mean as Mean
from weighting.stages.pools import Sum as Sum
from weighting.stages.pow import Pow as Pow
from weighting.stages.quadratic import Quadratic as Quadratic
from weighting.stages.table import Table as Table
from weighting.stages.target_prob import TargetProb as TargetProb
from weighting.stages.temperature import Temperature as Temperature
from weighting.stages.uniform import Uniform as Uniform
