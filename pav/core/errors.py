"""The one exception a user sees: one line that names the thing and the fix."""

from __future__ import annotations

import errno

# What a full disk, a quota or a limit of the process answers.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input or a state the user can mend. Commands print it without traceback and exit 2."""


def unwritable(output: object, error: OSError) -> UserError:
    """What to say when ``output`` could be written before, and cannot any more: a full disk."""
    return UserError(
        f"output {str(output)!r} cannot be written ({error.strerror}); what is finished is safe: "
        "free disk space or raise the quota there, then give the same command again"
    )
