"""The frozen cache: made by all ranks, continued after a kill, told apart from others."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_files
import tiny_frozen
import torch
from ranks import become_rank, run_ranks
from tiny_frozen import LAYERS, build, content, damage, truncate

from fttrain.cli import main
from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.fingerprint import fingerprint
from fttrain.frozen.quantize_layer import load_layer
from fttrain.frozen.readers import open_checkpoint
from fttrain.frozen.source import resolve
from fttrain.quant.checksum import checksum
from fttrain.quant.config import QuantConfig
from fttrain.strategy.builder import frozen_base
from fttrain.util import atomic_files
from fttrain.util.errors import UserError
from fttrain.util.manifest import write_sealed
from fttrain.util.units import MIB


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_frozen.model(tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("quant", [QuantConfig(), tiny.PLAIN], ids=["nf4", "none"])
def test_it_holds_what_was_quantised(name: str, quant: QuantConfig, tmp_path: Path) -> None:
    source = tiny.model(name)
    folder = tiny_files.save(source, tmp_path / "model")
    base = frozen_base(resolve(ModelConfig("tiny", str(folder))), quant, "float32")
    cache = build(folder, tmp_path, quant=quant)
    reader = open_checkpoint(base.source, source.config)
    assert len(cache) == base.architecture.layers
    for layer in range(len(cache)):
        flat = load_layer(reader, base.architecture, base.frozen_format, layer, tiny.CPU)
        assert torch.equal(content(cache, layer), flat)
        assert cache.checksum(layer) == int(checksum(flat))
        part = torch.empty(840, dtype=torch.uint8)
        cache.read(layer, part, 1680)
        assert torch.equal(part, flat[1680:2520])
    tensors = source.state_dict()
    for end, tensor in (
        ("embedding", "model.embed_tokens.weight"),
        ("final_norm", "model.norm.weight"),
        ("head", "lm_head.weight"),
    ):
        into = torch.empty_like(tensors[tensor])
        cache.read_end(end, into)
        assert torch.equal(into, tensors[tensor])
    assert cache.tied is (name == "llama_tied")
    assert {path.suffix for path in cache.folder.iterdir() if path.suffix} == {".bin", ".json"}
    assert [path.name for path in cache.folder.glob("*.json")] == ["manifest.json"]
    assert cache.size_bytes == sum(path.stat().st_size for path in cache.folder.glob("*.bin"))


def test_it_is_reused_and_another_source_gets_its_own(model: Path, tmp_path: Path) -> None:
    made: list[int] = []
    first = build(model, tmp_path, progress=lambda done, total: made.append(done))
    assert made == list(range(1, LAYERS + 4))
    again = build(model, tmp_path, progress=lambda done, total: made.append(done))
    assert (again.folder, again.digest, len(made)) == (first.folder, first.digest, LAYERS + 3)
    others = [build(model, tmp_path, quant=QuantConfig("fp4"))]
    tiny.model(num_hidden_layers=LAYERS, seed=1).save_pretrained(model, max_shard_size="300KB")
    others.append(build(model, tmp_path))  # same names, same sizes
    assert len({cache.digest for cache in (first, *others)}) == 3
    assert len({cache.folder for cache in (first, *others)}) == 3


def test_the_manifest_says_what_the_bytes_depend_on(model: Path, tmp_path: Path) -> None:
    cache = build(model, tmp_path)
    body = json.loads((cache.folder / "manifest.json").read_text())
    assert body["source"] == fingerprint(resolve(ModelConfig("tiny", str(model))))
    assert {file["name"] for file in body["source"]["files"]} >= {"config.json"}
    assert (body["quant"], body["dtype"]) == (["nf4", 64, True], "torch.float32")
    assert body["layout"]["qkv.packed"]["dtype"] == "torch.uint8"


@pytest.mark.parametrize("key", ["quant", "source"])
@pytest.mark.parametrize("verify", [False, True])
def test_a_cache_of_another_base_is_refused(
    verify: bool, key: str, model: Path, tmp_path: Path
) -> None:
    """Folders that changed places: same files, same sizes, other bytes."""
    right = build(model, tmp_path)
    shutil.rmtree(right.folder)
    if key == "source":
        other = tiny_files.save(
            tiny.model(num_hidden_layers=LAYERS, seed=1), tmp_path / "other", max_shard_size="300KB"
        )
        build(other, tmp_path).folder.rename(right.folder)
    else:
        build(model, tmp_path, quant=QuantConfig("fp4")).folder.rename(right.folder)
    before = atomic_files.sha256(right.path(0))
    with pytest.raises(UserError, match=rf"manifest.json: of another frozen base .*other {key}\)"):
        build(model, tmp_path, verify=verify)
    assert atomic_files.sha256(right.path(0)) == before


def test_files_of_another_base_do_not_count(model: Path, tmp_path: Path) -> None:
    """What a build that was killed left, in the folder of another one: sizes are the same."""
    right = build(model, tmp_path / "right")
    child = multiprocessing.get_context("fork").Process(
        target=killed_build, args=(model, tmp_path, "between", QuantConfig("fp4"))
    )
    child.start()
    child.join(60)
    (left,) = (tmp_path / "frozen").iterdir()
    assert {path.name for path in left.glob("layer*.json")} == {"layer_000.json", "layer_001.json"}
    left.rename(left.with_name(right.folder.name))
    cache = build(model, tmp_path)
    assert (cache.folder.name, cache.digest) == (right.folder.name, right.digest)


def killed_build(model: Path, root: Path, moment: str, quant: QuantConfig | None = None) -> None:
    """A build that a SIGKILL ends: after the third file, or while it writes layer 2."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing":
        sync = atomic_files.sync
        atomic_files.sync = lambda path: kill() if path.name == "layer_002.bin" else sync(path)
    build(model, root, progress=lambda done, _: kill() if done == 3 else None, quant=quant)


@pytest.mark.parametrize("moment", ["between", "writing"])
def test_a_killed_build_is_never_used_and_goes_on(moment: str, model: Path, tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=killed_build, args=(model, tmp_path, moment)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "frozen").iterdir()
    assert not (folder / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert {path.stem for path in kept} == {"embedding", "layer_000", "layer_001"}
    made: list[int] = []
    cache = build(model, tmp_path, progress=lambda done, total: made.append(total))
    assert made[-1] == LAYERS + 3 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.glob(".*part"))
    assert cache.digest == build(model, tmp_path / "other").digest


def on_two_ranks(model: Path, root: Path) -> tuple[str, int]:
    """This rank's digest, and how many files it wrote."""
    rank = torch.distributed.get_rank()
    return built_by(RankGroup(rank, 2, rank, tiny.CPU), model, root)


def on_two_machines(model: Path, seconds: list[Path], root: Path) -> list[tuple[str, int]]:
    """The same with a rank on each: in a folder that both see, then each in its own; then with
    each of ``seconds`` on the second one.
    """
    rank = int(os.environ["RANK"])
    become_rank(rank, 2, int(os.environ["MASTER_PORT"]), here=1)
    own = root / f"machine{rank}"
    with process_group(tiny.CPU) as group:
        found = [built_by(group, model, root / "shared"), built_by(group, model, own)]
        return found + [built_by(group, second if rank else model, own) for second in seconds]


def built_by(group: RankGroup, model: Path, root: Path) -> tuple[str, int]:
    wrote = []
    replace = atomic_files.replace

    def counted(path: Path, write: Callable[[Path], None]) -> None:
        if path.suffix == ".bin":
            wrote.append(path)
        replace(path, write)

    atomic_files.replace = counted
    try:
        return build(model, root, group).digest, len(wrote)
    except UserError as error:
        return str(error), len(wrote)
    finally:
        atomic_files.replace = replace


def test_ranks_divide_the_work_and_fail_together(model: Path, tmp_path: Path) -> None:
    found = run_ranks(on_two_ranks, 2, model, tmp_path / "two")
    digest = build(model, tmp_path / "one").digest
    assert found == [(digest, 5), (digest, 4)]
    shard = sorted(model.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-8])
    (first, _), (second, _) = run_ranks(on_two_ranks, 2, model, tmp_path / "broken")
    assert first == second
    assert f"{shard.name}: not a whole safetensors file" in first


def test_machines_build_each_its_own_and_one_that_they_share_once(
    model: Path, tmp_path: Path
) -> None:
    other = tiny_files.save(tiny.model(seed=1, num_hidden_layers=LAYERS), tmp_path / "other")
    broken = shutil.copytree(other, tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    first, second = run_ranks(
        on_two_machines, 2, model, [other, broken], tmp_path, process_group=False
    )
    digest = build(model, tmp_path / "one").digest
    shared, own, differing, unreadable = zip(first, second, strict=True)
    assert {found for found, _ in shared} == {digest}
    assert sorted(count for _, count in shared) == [0, 9]
    assert list(own) == [(digest, 9), (digest, 9)]
    (told, _), (also_told, _) = differing
    assert told == also_told
    assert told.startswith(f"frozen base is {digest} on machine 0 (")
    assert "not a whole safetensors file" in unreadable[1][0]
    assert unreadable[0][0] == f"machine 1 ({os.uname().nodename}): {unreadable[1][0]}"


def test_sizes_are_compared_at_each_start_and_contents_on_request(
    model: Path, tmp_path: Path
) -> None:
    cache = build(model, tmp_path)
    digest = cache.digest
    truncate(cache.path(1))
    made: list[int] = []
    assert build(model, tmp_path, progress=lambda _, total: made.append(total)).digest == digest
    damage(cache.path(4))
    damage(cache.folder / "embedding.bin")
    build(model, tmp_path)  # sizes are right
    assert made == [1]
    with pytest.raises(UserError, match=r"embedding.bin: its bytes are not those"):
        cache.read_end("embedding", torch.empty(tiny.VOCABULARY, 64))
    build(model, tmp_path, progress=lambda _, total: made.append(total), verify=True)
    assert made == [1, 2, 2]
    assert int(checksum(content(cache, 4))) == cache.checksum(4)
    damage(cache.folder / "manifest.json")
    assert build(model, tmp_path).digest == digest


def grown_bytes(model: Path, root: Path) -> int:
    """How far building a cache of ``model`` raises this process's peak memory."""
    build(model.parent / "small", root)  # libraries are loaded, kernels have run
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to the present RSS
    before = kib("VmRSS")
    build(model, root)
    return (kib("VmHWM") - before) * 1024


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path) -> None:
    tiny_files.save(tiny.model(), tmp_path / "small")
    source = tiny.model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    tiny_files.save(source, tmp_path / "large")
    tensor_bytes = [p.nbytes for n, p in source.named_parameters() if ".layers.0." in n]
    (grown,) = run_ranks(grown_bytes, 1, tmp_path / "large", tmp_path)
    # a layer as it is stored, one tensor in the compute dtype, the layer in 4 bits, and slack
    assert grown < sum(tensor_bytes) + max(tensor_bytes) + sum(tensor_bytes) // 7 + 64 * MIB


def test_the_command_makes_and_verifies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "model=local", f"model.path={model}", f"frozen.cache_dir={tmp_path}"]
    command += ["model.dtype=float32", "rig.device=cpu"]
    assert main(command) == 0
    assert f"{LAYERS} layers" in capsys.readouterr().out
    cache = build(model, tmp_path)
    damage(cache.path(2))
    assert main(command) == 0
    assert "1 file(s) made" in capsys.readouterr().out
    assert int(checksum(content(cache, 2))) == cache.checksum(2)
    shutil.rmtree(cache.folder)
    truncate(sorted(model.glob("*.safetensors"))[0])
    assert main(command) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_a_file_that_is_made_again_gets_a_record_of_its_own(model: Path, tmp_path: Path) -> None:
    """The manifest speaks of other bytes than those that quantising makes here."""
    cache = build(model, tmp_path)
    manifest = cache.folder / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["sha256"]
    body["files"]["layer_002"].update(sha256="0" * 64, checksum=1)
    write_sealed(manifest, body)
    made: list[int] = []
    for _ in range(2):  # the second time there is nothing to make
        again = build(model, tmp_path, progress=lambda _, total: made.append(total), verify=True)
        assert again.digest == cache.digest
        assert again.checksum(2) == int(checksum(content(again, 2)))
    assert made == [1]
