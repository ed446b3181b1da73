"""Measurements of a session's model on its held-out rows, taken into ``session.evaluation``.

Every rank calls these functions.
"""

from typing import Any

from fttrain.data.samples import HoldoutSample, holdout_samples
from fttrain.objective.metrics import METRICS
from fttrain.training.evaluation import SampleAnswer, answer
from fttrain.training.session import TrainSession


def measure_base(session: TrainSession) -> None:
    """Measure the base: the adapter must still be without effect."""
    evaluation, samples = session.evaluation, _samples(session)
    evaluation.base = session.holdout.loss(session.strategy)
    answers = answer(session.strategy, samples, session.inputs.tokenizer, session.say)
    evaluation.samples = [
        SampleAnswer(sample.prompt, sample.reference, before)
        for sample, before in zip(samples, answers, strict=True)
    ]


def measure_base_once(session: TrainSession) -> None:
    """Measure the base before the first step of a run, unless an earlier start has done so; its
    loss begins the history.
    """
    group, evaluation = session.group, session.evaluation
    # Rank 0 has read evaluation.json; other nodes may not see it.
    unmeasured = group.any(group.is_main and evaluation.base is None)
    if unmeasured and len(session.holdout.rows):
        session.say("measuring the base on the held-out rows")
        measure_base(session)
        evaluation.history = []
        add_to_history(session, evaluation.base)
        write_evaluation(session)


def measure_tuned(session: TrainSession) -> None:
    """Measure the model as it is now, and add its answers to those of ``measure_base``."""
    evaluation = session.evaluation
    evaluation.tuned = session.holdout.loss(session.strategy)
    answers = answer(session.strategy, _samples(session), session.inputs.tokenizer, session.say)
    for sample, after in zip(evaluation.samples, answers, strict=False):
        sample.after = after


def add_to_history(session: TrainSession, figures: dict[str, Any] | None) -> None:
    """Add the held-out metrics in ``figures`` to the history, at the session's step."""
    assert figures is not None
    metrics = {name: figures[name] for name in METRICS}
    session.evaluation.history.append({"step": session.step, **metrics})


def write_evaluation(session: TrainSession) -> None:
    """Replace evaluation.json; on rank 0."""
    if session.group.is_main:
        session.evaluation.write(session.output)


def _samples(session: TrainSession) -> list[HoldoutSample]:
    config, inputs = session.config, session.inputs
    return holdout_samples(config.data, inputs.dataset, inputs.tokenizer, config.loop.samples)
