"""Every error and warning that quaff_fx raises on purpose.

A text reads ``<subject>: <what is>, expected <what should be>. <what to do>.``
"""


class QuaffError(Exception):
    """The root of all errors of this package."""


class ConfigError(QuaffError, ValueError):
    """A field of `QuaffConfig`, or a model it is applied to, cannot be used as it is."""


class ShapeError(QuaffError, ValueError):
    """A tensor has a shape, dtype or device that an op or formula does not take."""


class CalibrationError(QuaffError):
    """The observed activations do not allow a conversion; nothing was converted."""


class PassError(QuaffError):
    """A pass failed or produced a graph that breaks the spec; the message names the pass."""


class CheckpointError(QuaffError):
    """A saved state does not fit the model it is loaded into."""


class WeightError(QuaffError):
    """Code tried to edit a weight that exists only as int8; the edit would have been lost."""


class QuaffWarning(UserWarning):
    """The person can go on, but should know."""
