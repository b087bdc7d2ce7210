"""The two ways a run can end badly, and what the command line makes of them."""


class InputError(ValueError):
    """Something the user gave is wrong: a key, a file, a column. Raised before any training; exit code 2."""


class RunError(RuntimeError):
    """A run could not go on; every finished round is saved, and `federa resume` goes on from there. Exit code 1."""
