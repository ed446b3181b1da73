"""The limits of how long ranks wait for each other."""

from datetime import timedelta

# For one request to the store; the rendezvous itself has no limit.
STORE_TIMEOUT = timedelta(seconds=60)


def collective_timeout() -> timedelta:
    """The longest that a rank waits in a collective, for NCCL and gloo alike.

    Longer than the slowest step: a rank that died ends the others sooner (``peer_watchdog``), and
    so does a node that went silent (``node_heartbeat``).
    """
    return timedelta(minutes=30)
