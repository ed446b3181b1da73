"""The text of ``fttrain COMMAND --help``: groups, their options, their keys with the comments of
``conf/``.
"""

import yaml

from fttrain.util.paths import conf_folder

SWEEPING = """\
fttrain train -m [group.key=value,value ...]   a sweep: a run for each combination of the values
  lora.r=8,16 optim.lr=1e-4,2e-4 lora=default,dora   values, or options, one after the other
  lora.r='range(8,33,8)' optim='glob(*8bit)'         a range, options by a pattern
  sweep=lora_lr                                      a search from conf/sweep, or from a file
  hydra/sweeper=optuna optim.lr='tag(log,interval(1e-5,1e-3))' hydra.sweeper.n_trials=20
  hydra/launcher=ray|submitit_local|submitit_slurm   where trials run, instead of here
  output=FOLDER      of the sweep: sweep.md, sweep.json, experiment/best.yaml, a folder a trial
  The same command again goes on: finished trials stay, failed ones are tried again."""


def settings() -> str:
    """The settings as text: every group with its options, and the file of its default."""
    root = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    defaults = [item for item in yaml.safe_load(root)["defaults"] if isinstance(item, dict)]
    pages = ["settings without a group:\n" + _indent(root.split("\n\n", 1)[1])]
    for item in defaults:
        (group, chosen), *_ = item.items()
        options = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        head = f"{group}={'|'.join(options)}  (default: {chosen or 'none'})"
        body = _keys(group, chosen) if chosen else "  a recipe that changes several groups at once"
        pages.append(f"{head}\n{body}")
    return "\n\n".join(pages)


def _keys(group: str, option: str) -> str:
    text = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return _indent("\n".join(f"{group}.{line}" for line in lines))


def _indent(text: str) -> str:
    return "\n".join(f"  {line.replace(': ', '=', 1)}" for line in text.splitlines() if line)
