"""Errors that a user can act on: the message says what is wrong, where, and the fix."""


class UserError(Exception):
    """An error that the launcher prints as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names the field, the value and the fix."""
