"""Whether layers are brought as fast as this machine's links could when they were measured."""

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig.profile import RigProfile, bus_bytes_per_s
from fttrain.rig.profile_drift import machine_profile
from fttrain.store import Traffic

SLOW = 2.0  # times what the profile says
IN_A_ROW = 3  # samples that have to say so


class LinkMonitor:
    """Says once that the compute waits longer for layers than bringing all of them should take.

    Most of the bringing is hidden, so who waits for more than the whole of it has a slow link, or a
    peer that comes late. Of a gather the rank that comes last waits for nobody: the least wait of
    all ranks counts. A pipeline's waits are mostly its bubble, and nothing is said of them.
    """

    def __init__(self, profile: RigProfile | None = None) -> None:
        """``profile``: of these ranks on this machine; None: nobody measured it."""
        self._profile = profile
        self._slow = 0  # samples in a row
        self._told = False

    def look(self, group: RankGroup, traffic: Traffic) -> str:
        """A line where it is to be said; ``traffic``: of this rank in a step. Every rank calls it
        and gets the same.
        """
        expected_s, here = (
            self.expected_s(group.intra_node.rank, traffic),
            group.intra_node.world_size,
        )
        own = traffic.wait_s / expected_s if expected_s else 0.0
        ratios, gathered_bytes = zip(*group.gather([own, traffic.gather_bytes]), strict=True)
        least_or_most = min if any(gathered_bytes) else max
        machines = range(0, group.world_size, here)  # layers are gathered inside each
        ratio = max(least_or_most(ratios[first : first + here]) for first in machines)
        self._slow = self._slow + 1 if ratio > SLOW else 0
        if self._slow < IN_A_ROW or self._told:
            return ""
        self._told = True
        return (
            f"{IN_A_ROW} samples in a row, the compute waited for layers, now {ratio:.1f} times as "
            "long as bringing all of them took when this machine was measured: a link is slower "
            "than it was, or others use it; `fttrain measure` and `fttrain doctor` say more"
        )

    def expected_s(self, rank: int, traffic: Traffic) -> float:
        """What bringing it takes at the profile's rates; 0: nobody knows, or there is nothing."""
        if self._profile is None or traffic.stage_bytes:
            return 0.0
        gather = to_card = None
        if any(not link.wrong for link in self._profile.links):
            link = self._profile.link()
            found = link.samples.get("all_gather", ())
            gather = bus_bytes_per_s("all_gather", found[-1], link.ranks) if found else None
        if rank < len(self._profile.cards):
            ways = self._profile.cards[rank].to_card
            to_card = ways.all_cards_bytes_per_s or ways.pinned_bytes_per_s
        seconds = 0.0
        copied_bytes = traffic.h2d_bytes + traffic.activation_bytes
        for size_bytes, rate in ((traffic.gather_bytes, gather), (copied_bytes, to_card)):
            if size_bytes and rate is None:
                return 0.0
            seconds += size_bytes / rate if rate else 0.0
        return seconds


def link_monitor(group: RankGroup, cache_dir: str | None) -> LinkMonitor:
    """One that knows the links as `fttrain measure` found them with as many cards, if it did. Of
    CPUs it says nothing: what computes there carries the bytes, too.

    ``cache_dir``: where the profile is, as frozen.cache_dir.
    """
    on_card = group.device.type == "cuda"
    ranks = group.intra_node.world_size
    profile = machine_profile(cache_dir, ranks) if on_card else None
    if profile is None or [card.kind for card in profile.cards] != ["cuda"] * ranks:
        return LinkMonitor()
    return LinkMonitor(profile)
