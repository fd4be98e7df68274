"""Exceptions that are meant for the user."""


class QwtError(Exception):
    """Something the user can mend: the message names the thing and says what to do.

    Everything else that is raised in this package is a bug of ours.
    """
