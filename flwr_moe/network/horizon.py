"""The end of the time a run was given."""


class HorizonReached(Exception):  # noqa: N818 - it ends a run, it is no mistake
    """The time is over; what was learnt until then stands."""
