"""The one error that a user can cause."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one line that names the file or field, the value found and what is expected; the command
    line shows it as it is and exits with code 2.
    """
