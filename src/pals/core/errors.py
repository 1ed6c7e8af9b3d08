"""The error classes; each answers one of: fix your input, retry, or fall back to a safe state."""

#: How to get the optional packages; the package is not on an index yet.
INSTALL = "from the checkout: pip install '.[vllm,nvml,client,simulate,evaluate]'"


class PalsError(Exception):
    """Base of every error PALS raises on purpose; the message says what failed, what is in force, what to do."""


class ConfigError(PalsError):
    """The user's input is wrong: fix it and start again; nothing was changed."""


class ProfileMismatchError(ConfigError):
    """A profile belongs to another engine, model, board or parallelism; it was not used."""


class OutsideProfileError(PalsError):
    """A point or load lies further outside what a profile was measured at than it may say anything about."""


class PermissionDeniedError(PalsError):
    """The driver refused a write for lack of privilege; the old value is still in force."""


class NotSupportedError(PalsError):
    """The board or driver lacks this reading or control; do without it."""


class NotPutBackError(PalsError):
    """Boards stand as PALS set them though it ends; the record of what was found stays for `pals restore`."""


class DeviceLostError(PalsError):
    """A board fell off the bus; its readings are unknown until it is back."""


class EngineGoneError(PalsError):
    """The serving engine has ended, or no longer takes part; restore the boards and stop."""
