"""The one exception for what a user can mend."""


class InputError(ValueError):
    """A mistake in what was asked for: one sentence that names it and the way out."""
