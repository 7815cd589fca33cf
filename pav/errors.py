"""The one exception a user sees: one line that names the thing and the fix."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a state the user can mend. Commands print it without traceback and exit 2."""
