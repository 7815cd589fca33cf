"""Seeds of requests, by key."""

from __future__ import annotations

import hashlib


def seed_of(*key: object) -> int:
    """Seed of a request: a hash of its key (run seed, problem, prefix, index), 63 bits."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
