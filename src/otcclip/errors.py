"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the caller can mend: one clear line, exit code 2.

    Raise it with a sentence that names the argument or file and what was found there. `cli.main` prints the
    message without a traceback; in Python it is an ordinary exception.
    """
