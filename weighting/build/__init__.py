"""Spec -> Plan -> Weighting."""

from weighting.build.build import build as build
from weighting.build.plan import Plan as Plan
from weighting.build.plan import plan_of as plan_of
from weighting.build.weighting import Weighting as Weighting
from weighting.build.weighting import Weights as Weights
