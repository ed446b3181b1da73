"""The error for users: one clear line and a non-zero exit code, never a traceback."""


class UserError(Exception):
    """A mistake or a condition the user can change.

    The message is one line that names the key, the file and line, the rank or the tensor, and
    states a remedy. ``exit_code`` becomes the exit code of the process.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The start of a library's error message, as one line; the error's class where it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
