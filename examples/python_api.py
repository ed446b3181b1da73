"""A run from Python: settings, plan, training, evaluation, export.

    python examples/python_api.py [OUTPUT [key=value ...]]

By default it takes ten steps of the demo: SmolLM2-135M on the docstrings of Python's standard
library, on the CPU or a GPU. Overrides are those of the command line. Under torchrun every rank
runs this script.
"""

import sys
from pathlib import Path

import fttrain

DEMO = ["experiment=demo", "loop.max_steps=10", "loop.samples=0"]


def main(output: Path, overrides: list[str]) -> fttrain.TrainResult:
    """Train, measure and export; print what came of it."""
    config = fttrain.load_config([*DEMO, *overrides, f"output={output}"])
    print(f"{config.model.name}, strategy={config.strategy.name}, r={config.lora.r}")

    result = fttrain.train(config)
    print(f"{result.steps} steps, exit code {result.exit_code}, adapter in {result.exported}")
    print(f"held-out loss {result.base_nll} -> {result.tuned_nll} nats/token")

    # A run that exists: its settings, and its figures measured again.
    saved = fttrain.load_run_config(output)
    evaluation = fttrain.evaluate(saved)
    print(f"base {evaluation.base}, tuned {evaluation.tuned}")

    # The adapter of the newest snapshot, in PEFT's format, wherever it is wanted.
    print(f"exported to {fttrain.export(saved, output / 'exported')}")
    return result


if __name__ == "__main__":
    try:
        main(Path(*sys.argv[1:2] or ["outputs/python_api"]), sys.argv[2:])
    except fttrain.UserError as error:
        sys.exit(f"{error}")
