"""How long ranks wait for each other."""

from datetime import timedelta

# Of one question to the store; how long ranks wait for each other there has no limit.
STORE_TIMEOUT = timedelta(seconds=60)


def collective_timeout() -> timedelta:
    """The longest that a rank waits in a collective, for NCCL and gloo alike.

    Longer than the slowest step: a rank that died ends the others sooner (``peer_watchdog``), and
    so does a machine that went silent (``node_heartbeat``).
    """
    return timedelta(minutes=30)
