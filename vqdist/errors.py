"""The one exception that means: the user can mend this, and the message says how."""


class UserError(ValueError):
    """A mistake in what the user wrote or gave: one line with what was found, what was expected and what to do.

    The command line prints the message alone and exits with 2; in Python it is a `ValueError`.
    """
