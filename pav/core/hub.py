"""The model and data hub: found out once, in seconds, whether it can be reached."""

from __future__ import annotations

import os
import sys
import threading
from functools import cache

SECONDS = 5.0


@cache
def offline_if_unreachable() -> None:
    """Where the hub does not answer, use its cache alone from now on, and say so.

    Its clients try every file six times, for minutes, before they look into their caches.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception:  # of several packages, and whatever it is: no answer
            return
        answered.set()

    # A name server that is silent knows no time limit of ours: a thread can be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    if answered.is_set():
        return
    print(f"{constants.ENDPOINT} does not answer: only what is cached of it is used")
    os.environ["HF_HUB_OFFLINE"] = "1"  # for worker processes, and for what is not imported yet
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
