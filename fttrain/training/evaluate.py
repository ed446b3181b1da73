"""The evaluation of a run that has been trained, or still trains."""

from pathlib import Path

from fttrain.config.run_config import RunConfig
from fttrain.distributed.process_group import process_group
from fttrain.launcher.launch import require_ranks
from fttrain.rig.device_setup import set_up_rank
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.training.auto_plan import resolve_auto
from fttrain.training.checkpointing import last_micro_batch_size, lock_on_main
from fttrain.training.evaluation import Evaluation
from fttrain.training.export import find_trained
from fttrain.training.held_out import measure_base, measure_tuned, write_evaluation
from fttrain.training.inputs import prepare_inputs
from fttrain.training.session import build_session
from fttrain.util.errors import UserError


def evaluate(config: RunConfig) -> Evaluation:
    """Measure the base and the tuned model of the run in ``config.output`` on the held-out rows,
    and replace the figures in its evaluation.json. Every rank calls it.

    ``config``: the run's settings, as ``load_run_config`` returns them. Raises UserError where no
    trained adapter (or model) is there, nothing is held out, or nodes differ in their settings.
    """
    require_ranks(config.launch)
    device = set_up_rank(config.rig, config.strategy.name == DEEPSPEED)
    if config.left_open:  # changes of the run's settings may leave something open again
        config, _ = resolve_auto(config)
    trained = find_trained(config)
    inputs = prepare_inputs(config)
    if not len(inputs.dataset.holdout):
        raise UserError(f"data.holdout={config.data.holdout}: nothing is held out to evaluate on")
    lock = lock_on_main(config.output, "auto")
    with lock, process_group(device, config.rig.backend) as group:
        session = build_session(config, group, inputs)
        # Rank 0's, for other nodes may not see the run's snapshots
        size = int(group.broadcast_str(str(last_micro_batch_size(config)) if group.is_main else ""))
        session.holdout.micro_batch_size = size
        session.evaluation = Evaluation.read(Path(config.output))
        measure_base(session)
        session.strategy.load_adapter_state(trained)
        measure_tuned(session)
        write_evaluation(session)
        session.say(session.evaluation.summary())
    return session.evaluation
