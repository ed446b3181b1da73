"""The launcher: what ranks are told, how they are stopped, and that none is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from fttrain.launcher import launch
from fttrain.launcher.accelerate_yaml import DEEPSPEED_VARIABLES, read_env
from fttrain.launcher.launch import LaunchConfig
from fttrain.util.errors import UserError
from fttrain.util.paths import launch_folder

FILES = sorted(launch_folder().glob("*.yaml"))
WAIT_S = 60

# A rank that writes down which signals it gets, saves for a while and leaves as asked.
RANK = """
import os, signal, sys, time
from pathlib import Path
from fttrain.launcher.launch import die_with_parent
die_with_parent()
rank, folder = os.environ["RANK"], Path(sys.argv[1])
got = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: got.append(signum))
(folder / f"pid{rank}").write_text(str(os.getpid()))
while not got or "deaf" in sys.argv:
    time.sleep(0.01)
time.sleep(1)
(folder / f"got{rank}").write_text(" ".join(str(int(signum)) for signum in got))
sys.exit(128 + got[0])
"""

# A launcher of two such ranks.
LAUNCHER = """
import os, sys
from fttrain.launcher import launch
from fttrain.launcher.environment import PARENT_PID
launch.REPEAT_S = float(sys.argv[3])
environment = {**os.environ, PARENT_PID: str(os.getpid())}
command = [sys.executable, *sys.argv[1:3], *sys.argv[4:]]
sys.exit(launch.supervise([(command, {**environment, "RANK": str(rank)}) for rank in range(2)]))
"""


def run_python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def eventually(what: str, *paths: Path) -> list[str]:
    deadline = time.monotonic() + WAIT_S
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return [path.read_text() for path in paths]


def is_alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_gone(pids: list[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlives its launcher"
        time.sleep(0.02)


@pytest.fixture
def two_ranks(tmp_path: Path):
    """Starts a launcher with two ranks; returns it and the ranks' pids. Leaves nothing behind."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    pids: list[str] = []
    started: list[subprocess.Popen[str]] = []

    def start(repeat_s: float = 5.0, *more: str) -> tuple[subprocess.Popen[str], list[str]]:
        arguments = [str(tmp_path / "rank.py"), str(tmp_path), str(repeat_s), *more]
        command = [sys.executable, str(tmp_path / "launcher.py"), *arguments]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        pids.extend(eventually("ranks start", tmp_path / "pid0", tmp_path / "pid1"))
        return started[0], pids

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for pid in pids:
        if is_alive(pid):
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    ("sent", "received"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
def test_a_signal_reaches_each_rank_once_and_they_finish_saving(
    two_ranks, tmp_path: Path, sent: str, received: str
) -> None:
    launcher, pids = two_ranks()
    for _ in range(3):  # an impatient finger
        launcher.send_signal(getattr(signal, sent))
        time.sleep(0.1)
    signum = int(getattr(signal, received))
    assert launcher.wait(WAIT_S) == 128 + signum
    assert eventually("saved", tmp_path / "got0", tmp_path / "got1") == [str(signum)] * 2
    assert_gone(pids)


def test_a_repeated_signal_is_passed_on_and_the_third_kills(two_ranks) -> None:
    launcher, pids = two_ranks(0.0, "deaf")
    for _ in range(2):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert all(is_alive(pid) for pid in pids)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(WAIT_S) == 130
    assert_gone(pids)


def test_ranks_die_with_a_launcher_that_is_killed(two_ranks) -> None:
    launcher, pids = two_ranks()
    launcher.kill()
    assert_gone(pids)


def test_ranks_die_with_accelerate(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    file = str(launch_folder() / "cpu_demo.yaml")
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*module, "--config_file", file, str(tmp_path / "rank.py"), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        pids = eventually("accelerate starts two ranks", tmp_path / "pid0", tmp_path / "pid1")
        time.sleep(0.5)
        assert all(is_alive(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()
    assert_gone(pids)


def test_a_launcher_that_was_gone_already_ends_the_rank() -> None:
    program = (
        "from fttrain.launcher.launch import die_with_parent\n"
        "die_with_parent(1 << 22); print('alive')"
    )
    done = subprocess.run(run_python(program), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_all_well_is_zero() -> None:
    assert launch.supervise([(run_python("pass"), dict(os.environ))] * 2) == 0


def test_the_first_failure_stops_the_others_and_is_the_exit_code(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    other = f"""
import signal, sys, time
def stop(signum, frame):
    open({str(asked)!r}, "w").write(str(int(signum)))
    sys.exit(9)
signal.signal(signal.SIGTERM, stop)
open({str(tmp_path / "ready")!r}, "w").write("yes")
time.sleep(600)
"""
    first = f"""
import pathlib, sys, time
while not pathlib.Path({str(tmp_path / "ready")!r}).exists(): time.sleep(0.01)
sys.exit(5)
"""
    environment = dict(os.environ)
    assert (
        launch.supervise([(run_python(other), environment), (run_python(first), environment)]) == 5
    )
    assert asked.read_text() == str(int(signal.SIGTERM))


def test_a_deaf_rank_is_killed_after_the_grace_period(capfd: pytest.CaptureFixture[str]) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    dead = "import os, time; time.sleep(1); os.kill(os.getpid(), 9)"
    environment = dict(os.environ)
    ranks = [(run_python(deaf), environment), (run_python(dead), environment)]
    assert launch.supervise(ranks, grace_s=0.2) == 137
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_the_users_mistake_is_told_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(launch_folder())  # a folder without the package
    config = LaunchConfig(name="cpu_demo", file="cpu_demo.yaml")
    assert launch.start(config, ["train", "optim.lr=fast"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == [
        "fttrain: error: optim.lr='fast': a number is wanted"
    ]


def test_what_ranks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")  # the user's own word
    ranks = launch.commands(LaunchConfig(name="2x4090", file="2x4090.yaml"), ["train", "a=b"])
    assert [command for command, _ in ranks] == [
        [sys.executable, "-m", "fttrain", "train", "a=b"]
    ] * 2
    for rank, (_, environment) in enumerate(ranks):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert environment["NCCL_P2P_DISABLE"] == "0"
        assert environment["NCCL_IB_DISABLE"] == "1"
    assert ranks[0][1]["MASTER_PORT"] == ranks[1][1]["MASTER_PORT"]


def test_the_number_of_ranks() -> None:
    assert len(launch.commands(LaunchConfig(file="cpu_demo.yaml", processes=3), [])) == 3
    assert len(launch.commands(LaunchConfig(processes=2), [])) == 2
    assert len(launch.commands(LaunchConfig(file="one_card.yaml"), [])) == 1


def test_how_many_ranks_there_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.ranks_wanted(LaunchConfig()) is None
    for config in (LaunchConfig(file="cpu_demo.yaml", processes=3), LaunchConfig(processes=3)):
        assert launch.ranks_wanted(config) == len(launch.commands(config, [])) == 3
    assert launch.ranks_wanted(LaunchConfig(file="cpu_demo.yaml")) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a launcher that has already started them
    assert launch.ranks_wanted(LaunchConfig()) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on two machines
    assert launch.ranks_wanted(LaunchConfig()) == 2


def test_who_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.wanted(LaunchConfig(file="cpu_demo.yaml"))
    assert launch.wanted(LaunchConfig(processes=2))
    assert not launch.wanted(LaunchConfig())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.wanted(LaunchConfig(file="cpu_demo.yaml"))


def test_a_taken_port_is_replaced() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch.free_port(port) != port
    assert launch.free_port(port) == port


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_launch_files_are_accelerates_and_give_reasons(file: Path) -> None:
    settings = load_config_from_file(str(file))  # raises on a key that accelerate does not know
    machines = 2 if file.stem == "two_machines" else 1
    assert settings.num_machines == machines
    assert settings.main_process_port == (0 if machines == 1 else 29500)
    assert settings.num_processes == (1 if file.stem == "one_card" else 2 * machines)
    environment = file.with_suffix(".env")
    assert environment.name in file.read_text()
    lines = [line for line in environment.read_text().splitlines() if not line.startswith("#")]
    assert all(line.partition(" # ")[2].strip() for line in lines), "a variable without its reason"
    shell = f"set -a; . {environment}; exec env"
    read = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    for name, value in read_env(environment).items():
        assert f"{name}={value}" in read.splitlines(), "a shell reads it differently"


def test_every_launch_option_has_its_file() -> None:
    names = {path.stem for path in FILES}
    conf = launch_folder().parent / "conf" / "launch"
    assert {path.stem for path in conf.glob("*.yaml")} == names | {"none"}
    for name in names:
        assert yaml.safe_load((conf / f"{name}.yaml").read_text())["file"] == f"{name}.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: two", "num_processes: 'two': a whole number"),
        ("num_machines: 2", "torchrun --nnodes 2 --nproc-per-node 1 "),
        ("num_machines: 3\nnum_processes: 12", "torchrun --nnodes 3 --nproc-per-node 4 "),
        ("distributed_type: FSDP", "distributed_type: FSDP"),
        ("just words", "`key: value` lines"),
        ("a: [1", "not YAML"),
    ],
)
def test_a_wrong_launch_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        launch.commands(LaunchConfig(file=str(tmp_path / "mine.yaml")), [])
    assert message in str(caught.value)


def test_a_missing_launch_file() -> None:
    with pytest.raises(UserError, match=r"no such file; there are .*cpu_demo\.yaml"):
        launch.commands(LaunchConfig(file="nope.yaml"), [])


@pytest.mark.parametrize("line", ["NAME", "A B=c", "A='b'", "A=$HOME", "A=b c"])
def test_a_wrong_line_of_an_env_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.env").write_text(f"# fine\nGOOD=1  # reason\n{line}\n")
    with pytest.raises(UserError, match=r"x\.env:3"):
        read_env(tmp_path / "x.env")


@pytest.mark.deepspeed
@pytest.mark.parametrize("file", [f for f in FILES if f.stem.startswith("deepspeed")])
def test_ranks_are_told_of_deepspeed_as_accelerate_tells_them(file: Path) -> None:
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(file), "-m", "fttrain", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # as the command does next
    _, theirs = prepare_deepspeed_cmd_env(arguments)
    (_, ours), _ = launch.commands(LaunchConfig(file=file.name), ["train"])
    known = {"ACCELERATE_USE_DEEPSPEED", *DEEPSPEED_VARIABLES.values()}
    told = {name: value for name, value in theirs.items() if name in known}
    assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file.stem.split("zero")[1][0]
    assert {name: value for name, value in ours.items() if name in known} == told
