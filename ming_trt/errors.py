"""Every error that a user may see.

One sentence each, naming the value, the limit and the remedy. The command line prints the sentence and exits with
`exit_code`; the server sends it to the client with the matching status. Anything else that escapes is a bug.
"""


class MingError(Exception):
    """Base of all expected failures."""

    exit_code = 1


class ConfigError(MingError):
    """A configuration file or preset is missing, malformed or out of range."""


class CheckpointError(MingError):
    """A checkpoint lacks a file or tensor, or holds one of the wrong shape, type or size."""


class InputError(MingError):
    """A request (text, image, video, audio, option) cannot be used. The server stays up."""


class BuildError(MingError):
    """A build step failed."""


class BundleError(MingError):
    """A bundle is missing, damaged, or was made for something else."""


class EngineError(MingError):
    """An engine could not be loaded, or gave an output that is not finite or of the wrong shape."""


class ServeError(MingError):
    """The server could not be started, or answered with an error."""


class CancelledError(MingError):
    """The request was cancelled by its client, or its lease ran out."""


class UnavailableError(MingError):
    """The feature needs something that is not installed or not present here."""


def parse_error(message: str) -> MingError | None:
    """The error in `NAME: SENTENCE`, as errors travel between processes; None if `message` is not of that form."""
    name, _, sentence = message.partition(": ")
    kind = globals().get(name)
    return kind(sentence) if isinstance(kind, type) and issubclass(kind, MingError) else None
