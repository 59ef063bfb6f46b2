"""The one exception that is shown to a person."""


class UserError(Exception):
    """A mistake that its maker can mend: one line that says what was got, what was expected and what to do.

    Commands print it without a traceback and exit with status 1. The line stays one whatever it quotes: white space becomes
    a space, and characters that a terminal would obey or cannot show are escaped.
    """

    def __init__(self, message: str):
        words = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in words))
