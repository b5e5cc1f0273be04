"""What is raised where data is not as it should be."""


class DataError(ValueError):
    """A data file is missing, damaged, or not laid out as expected."""


class CountError(DataError):
    """A data set has fewer images than were asked for."""
