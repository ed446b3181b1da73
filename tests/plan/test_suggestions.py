"""What would fit where nothing does."""

from dataclasses import replace

from tiny_rig import ROOMY, SPEC, A, chosen, rig

from fttrain.plan.choose import judge
from fttrain.plan.suggestions import suggest_change
from fttrain.strategy.spec import StepSize, StrategySpec


def taken_bytes(spec: StrategySpec) -> int:
    return judge(spec, A, rig(ROOMY)).memory[0].device_bytes


def test_what_can_move_to_the_host_moves_there_first() -> None:
    offloaded = replace(SPEC, optim=replace(SPEC.optim, offload=True))
    assert taken_bytes(offloaded) < taken_bytes(SPEC)
    short = rig(taken_bytes(offloaded))
    nearest = judge(SPEC, A, short)
    assert not nearest.fits
    assert suggest_change(nearest, A, short) == "it fits with optim.offload=true"


def test_levers_add_up_until_it_fits() -> None:
    placement = replace(SPEC.placement, layer_inputs="host", embedding="host")
    optim = replace(SPEC.optim, offload=True)
    short = rig(taken_bytes(replace(SPEC, optim=optim, placement=placement)))
    said = suggest_change(judge(SPEC, A, short), A, short)
    assert said == "it fits with optim.offload=true layer_inputs=host embedding=host"


def test_a_layer_that_keeps_everything_leaves_no_boundary_to_move() -> None:
    kept = replace(SPEC, placement=replace(SPEC.placement, activations="keep"))
    short = rig(1000)
    assert "layer_inputs" not in suggest_change(judge(kept, A, short), A, short)


def test_where_nothing_smaller_helps_a_larger_rig_is_named() -> None:
    tight = rig(100_000)
    assert "the smallest rig of conf/rig/profiles" in suggest_change(chosen(tight)[0], A, tight)


def test_shorter_rows_hold_fewer_documents() -> None:
    """What flash attention takes for each of them on a card is most of what a step takes."""
    placement = replace(SPEC.placement, layer_inputs="host", embedding="host", lm_head="host")
    long = replace(SPEC, optim=replace(SPEC.optim, offload=True), placement=placement)
    long, short = (
        replace(long, size=StepSize(1, seq_len, 1, row_documents=documents))
        for seq_len, documents in ((1024, 200), (256, 50))
    )
    tight = rig(taken_bytes(short))
    assert suggest_change(judge(long, A, tight), A, tight) == "it fits with data.seq_len=256"
