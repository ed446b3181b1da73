"""Monitor of the links: compares waits for layers with the rates of the rig's profile."""

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig.profile import RigProfile, bus_bytes_per_s
from fttrain.rig.profile_drift import machine_profile
from fttrain.store import Traffic

SLOW = 2.0  # ratio of the wait to the profile's time from which a link counts as slow
IN_A_ROW = 3  # slow samples before it is reported


class LinkMonitor:
    """A warning, once, when the compute waits longer for layers than moving all of them should
    take.

    Most of the transfer time is hidden behind compute, so a wait for more than the whole of it
    means a slow link or a late peer. The last rank of a gather waits for nobody: the least wait of
    all ranks counts. A pipeline's waits are mostly its bubble and are not reported.
    """

    def __init__(self, profile: RigProfile | None = None) -> None:
        """``profile``: of these ranks on this node; None: not measured."""
        self._profile = profile
        self._slow_samples = 0  # in a row
        self._reported = False

    def look(self, group: RankGroup, traffic: Traffic) -> str:
        """The warning's text, or "". ``traffic``: of this rank in a step. A collective call with
        the same result on every rank.
        """
        node = group.intra_node
        expected_s = self.expected_s(node.rank, traffic)
        local_ratio = traffic.wait_s / expected_s if expected_s else 0.0
        ratios, gathered_bytes = zip(
            *group.gather([local_ratio, traffic.gather_bytes]), strict=True
        )
        least_or_most = min if any(gathered_bytes) else max
        nodes = range(0, group.world_size, node.world_size)  # layers are gathered inside each
        ratio = max(least_or_most(ratios[first : first + node.world_size]) for first in nodes)
        self._slow_samples = self._slow_samples + 1 if ratio > SLOW else 0
        if self._slow_samples < IN_A_ROW or self._reported:
            return ""
        self._reported = True
        return (
            f"{IN_A_ROW} samples in a row, the compute waited for layers, now {ratio:.1f} times as "
            "long as bringing all of them took when this machine was measured: a link is slower "
            "than it was, or others use it; `fttrain measure` and `fttrain doctor` say more"
        )

    def expected_s(self, rank: int, traffic: Traffic) -> float:
        """Seconds for ``traffic`` of the node's ``rank`` at the profile's rates; 0: not known, or
        no traffic.
        """
        if self._profile is None or traffic.stage_bytes:
            return 0.0
        gather = to_card = None
        if any(not link.wrong for link in self._profile.links):
            link = self._profile.link()
            samples = link.samples.get("all_gather", ())
            gather = bus_bytes_per_s("all_gather", samples[-1], link.ranks) if samples else None
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
    """A monitor with the profile that `fttrain measure` has written for as many cards, if any. It
    never warns on CPUs: there the compute's cores also carry the bytes.

    ``cache_dir``: the folder of the profile, as frozen.cache_dir.
    """
    on_card = group.device.type == "cuda"
    ranks = group.intra_node.world_size
    profile = machine_profile(cache_dir, ranks) if on_card else None
    if profile is None or [card.kind for card in profile.cards] != ["cuda"] * ranks:
        return LinkMonitor()
    return LinkMonitor(profile)
