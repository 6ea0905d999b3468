"""Randomness without state: every draw has an address, and the address is its seed."""

import hashlib


def address_seed(*address: int | str) -> int:
    """Return a 63-bit seed for an address such as (seed, stage, step, sample): no state needed.

    Args:
        *address: Numbers and texts, joined by "/"; their order counts.
    """
    text = "/".join(str(part) for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
