"""The one exception for what a user can mend."""


class InputError(ValueError):
    """A mistake in what was asked for: the message is one sentence that names it and the way out."""
