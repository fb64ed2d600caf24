"""The errors that are mistakes a user can fix. Their message is one sentence; programs print it and exit with 2."""


class ConfigError(ValueError):
    """A configuration that cannot be trained; the message names the field."""


class RunError(RuntimeError):
    """Anything else that a user can fix: a file, an environment, too little memory; the message names it."""


class DiscoveryError(RuntimeError):
    """A module of an environment or a belief model that cannot be used; the message names it."""
