"""The errors a user of the pipeline can meet; every message ends with what to do.

Errors of single items (a photo, a chip) are not here: those are rows with a status and a reason.
"""


class GraftError(Exception):
    """Base of every error that graft_pipeline raises on purpose."""


class InputError(GraftError):
    """What the user handed in (a file, a key, an argument) cannot be used as it is."""


class SettingsError(GraftError):
    """The deployment's settings or credentials are missing, contradictory or refused."""


class ServiceError(GraftError):
    """An outside service cannot be reached, or keeps failing after bounded retries."""


class DataError(GraftError):
    """A stored dataset does not obey its schema or the rules of the data."""


class TrainingError(GraftError):
    """A training cannot go on; its last checkpoint is intact."""


class ItemError(GraftError):
    """One photo or chip could not be had; its caller turns this into a row with a reason.

    Attributes:
        reason: snake_case word for the `reason` column, such as `truncated` or `not_an_image`.
        is_permanent: True if trying again cannot help.
    """

    def __init__(self, reason: str, message: str, *, is_permanent: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.is_permanent = is_permanent
