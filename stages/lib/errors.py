"""The one exception that is shown to a person."""


class UserError(Exception):
    """A mistake that its maker can mend: one line that says what was got, what was expected and what to do.

    Commands print it without a traceback and exit with status 1. The line stays one whatever it quotes: white space becomes
    a space, and characters that a terminal would obey or cannot show are escaped.
    """

    def __init__(self, message: str):
        words = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in words))


def telling_line(error: Exception) -> str:
    """The line that says most of an error of torch, which has many: a compiler's first error, else the first that is no mere
    "backend='inductor' raised:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.rstrip().endswith("raised:")]
    return next((line for line in lines if " error: " in line), lines[0] if lines else type(error).__name__)
