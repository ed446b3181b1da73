"""The command line: ``fttrain COMMAND [key=value ...]``.

Each command is a module here with ``run(config, argv) -> exit code``, imported only for that
command.
"""

import importlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from fttrain import __version__
from fttrain.launcher.environment import PARENT_PID
from fttrain.launcher.launch import die_with_parent, is_owned, is_rank
from fttrain.util.errors import UserError
from fttrain.util.redact import redact
from fttrain.util.schema import nearest

COMMANDS = {
    "train": "fine-tune a model with QLoRA",
    "evaluate": "held-out loss and answers of the base and of the tuned model of a run",
    "quantize": "quantise a model into the cache that runs start from, or verify the cache",
    "doctor": "is this machine fit for a run, and what mends it (--json for programs)",
    "data": "show a few examples as the model sees them, and their lengths",
    "measure": "measure cards, host and links, and save the figures as this machine's profile",
    "plan": "memory and speed of every strategy on a rig (--table: memory of common sizes)",
    "report": "write report.md and the loss plot of a run",
}
FLAGS = {"doctor": {"--json"}, "plan": {"--table"}}  # of a command, beside key=value
SWEEP = ("-m", "--multirun")  # flags of train, as in Hydra
_LATER_S = 5.0  # see _report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if is_owned():
        die_with_parent()  # before anything slow: a rank never outlives its launcher
        os.environ.pop(PARENT_PID, None)  # is for this process, not for its children
        # A parent process may have blocked stop signals (Ray blocks SIGINT).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        return _dispatch(arguments)
    except UserError as error:
        if os.environ.get("FTTRAIN_DEBUG") == "1":
            raise
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `fttrain train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"fttrain {__version__}")
        return 0
    command, *overrides = arguments
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        raise UserError(
            f"{redact(command)}: no such command; "
            + (f"did you mean {near}?" if near else f"there are: {', '.join(COMMANDS)}")
        )
    if {"-h", "--help"} & set(overrides):
        from fttrain.cli.help import settings

        print(f"usage: fttrain {command} [group=option ...] [group.key=value ...]\n")
        print(f"{COMMANDS[command]}\n")
        if command == "train":
            from fttrain.cli.help import SWEEPING

            print(f"{SWEEPING}\n")
        print(settings())
        return 0
    # On the CPU every rank's import of bitsandbytes warns of a missing optional package, which is
    # not needed here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if {*SWEEP} & {*overrides}:
        return _sweep(command, [text for text in overrides if text not in SWEEP])
    # Late: help and a wrong command need neither Hydra nor the imports of a command.
    from fttrain.config.run_config import compose

    flags = FLAGS.get(command, set())
    config = compose([text for text in overrides if text not in flags])
    module = importlib.import_module(f"fttrain.cli.{command}")
    code: int = module.run(config, arguments)
    sys.stdout.flush()
    return code


def _sweep(command: str, overrides: list[str]) -> int:
    if command != "train":
        raise UserError(f"{command} -m: only `fttrain train` sweeps")
    if is_rank():
        ranks = f"launch.processes={os.environ['WORLD_SIZE']}"
        command_line = redact(shlex.join(["fttrain", "train", "-m", ranks, *overrides]))
        raise UserError(
            "-m: a sweep starts the ranks of each trial itself and cannot run inside a launcher; "
            f"write: {command_line}"
        )
    from fttrain.cli.sweep import sweep  # loads Hydra

    return sweep(overrides)


def _usage() -> str:
    lines = ["usage: fttrain COMMAND [group=option ...] [group.key=value ...]", "", "commands:"]
    lines += [f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()]
    lines += [
        "",
        "fttrain train --help    lists every setting with its options and defaults",
        "fttrain --version       prints the version",
        "FTTRAIN_DEBUG=1         in the environment: errors keep their traceback",
    ]
    return "\n".join(lines)


def _report(error: UserError) -> None:
    """Print one line on stderr, once for all ranks of a machine.

    Ranks usually fail alike. Rank 0 prints at once, and the launcher then ends the others. Another
    rank prints only if it is still alive after a while, that is, if it failed alone.
    """
    rank = os.environ.get("RANK", "0") if is_rank() else "0"
    if rank != "0" and os.environ.get("LOCAL_RANK") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_LATER_S)
    where = "" if rank == "0" else f"rank {rank}: "
    line = " ".join(str(error).split())
    print(f"fttrain: error: {where}{redact(line)}", file=sys.stderr, flush=True)
