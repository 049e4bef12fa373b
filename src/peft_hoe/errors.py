"""The exceptions and warnings of peft_hoe. All errors that a user's input can cause are `ValueError`s."""


class HoEError(ValueError):
    """Base class of every error that peft_hoe raises about its input."""


class PreferenceError(HoEError):
    """A preference is not a point of the simplex, has the wrong shape or names an unknown objective."""


class ExpertError(HoEError):
    """The experts or routers of a configuration contradict each other or the objectives."""


class CheckpointError(HoEError):
    """A checkpoint or adapter file is unreadable, incomplete, of the wrong shape or not finite."""


class StaticMergeError(HoEError):
    """Weights cannot be merged because a vote depends on the input, the rows differ or the base is quantised."""


class RewardError(HoEError):
    """A reward is missing, matches no objective, hangs, or did not return one number for each sample."""


class MetricError(HoEError):
    """Points, preferences or a reference point cannot be measured: empty, NaN, infinite, or of the wrong shape."""


class HoEWarning(UserWarning):
    """Something works, but perhaps not as its user expects."""
