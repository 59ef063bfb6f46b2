"""The one exception that is shown to a person."""


class UserError(Exception):
    """A mistake that its maker can mend: one line that says what was got, what was expected and what to do.

    Commands print it without a traceback and exit with status 1.
    """
