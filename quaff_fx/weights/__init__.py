"""What a frozen weight is, and the modules that own one: a weight answers for itself what can be done with it."""

from quaff_fx.weights.float import FloatWeight
from quaff_fx.weights.int8_weight import Int8Weight
from quaff_fx.weights.loaded import LoadedWeight
from quaff_fx.weights.owners import Weight, WeightState
from quaff_fx.weights.quantized import OutlierState, QuantizedWeight
from quaff_fx.weights.state import Int8State

__all__ = [
    "FloatWeight",
    "Int8State",
    "Int8Weight",
    "LoadedWeight",
    "OutlierState",
    "QuantizedWeight",
    "Weight",
    "WeightState",
]
