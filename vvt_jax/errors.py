"""What a user can mend: commands print it as one sentence and exit with status 1."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the thing and the mend."""
