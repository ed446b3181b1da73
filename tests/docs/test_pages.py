"""The pages of the site: their commands, settings and files exist, and the site builds strictly."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import doc_commands
import pytest
import yaml

import fttrain
from fttrain.config.groups import groups
from fttrain.config.run_config import RunConfig
from fttrain.util import schema

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HISTORY = DOCS / "lab-log.md"  # entries keep the names of their day
CURRENT = [page for page in PAGES if page != HISTORY]
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SETTING = re.compile(r"(?<![\w/.])((?:[a-z_0-9]+\.)*[a-z_0-9]+)=[^=\s]")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|env|sh|md)")
NAME = re.compile(r"(?:[A-Z]\w*[a-z]\w*)(?:\.\w+)?")  # a class, or a method of one
FOREIGN_NAMES = ("DictConfig", "Params4bit")  # of libraries
# Before "=" without being a setting of fttrain
FOREIGN = ("key", "iommu", "memory", "hydra")


def pages(files: list[Path]) -> list[object]:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in files]


@pytest.mark.parametrize("page", pages(CURRENT))
def test_commands(page: Path) -> None:
    for command in doc_commands.commands(page.read_text(encoding="utf-8")):
        doc_commands.check_command(command)


@pytest.mark.parametrize("page", pages(CURRENT))
def test_settings_exist(page: Path) -> None:
    known = groups()
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        for key in SETTING.findall(code):
            group = key.partition(".")[0]
            if group in FOREIGN or key.isupper() or key in known or group in ("sweep", "rdzv"):
                continue
            schema.lookup(RunConfig, key.split("."))


@pytest.mark.parametrize("page", pages(CURRENT))
def test_files_exist(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        if FILE.fullmatch(code) and not re.search(
            r"[A-Z]{4}|^outputs/|^experiment/|^checkpoints/", code
        ):
            places = (ROOT / code, ROOT / "fttrain" / code, page.parent / code)
            assert any(place.exists() for place in places), code


@pytest.mark.parametrize("page", pages([page for page in CURRENT if page.parent.name != "recipes"]))
def test_classes_and_methods_exist(page: Path) -> None:
    words = set(re.findall(r"\w+", source()))
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        if NAME.fullmatch(code) and code not in FOREIGN_NAMES and "_" not in code.split(".")[0]:
            assert set(code.split(".")) <= words, code


@pytest.mark.parametrize("page", pages([page for page in CURRENT if "python" in page.name.lower()]))
def test_the_python_api_is_as_described(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)\(", text)) | {"TrainResult", "UserError"}
    assert described <= set(fttrain.__all__), described
    functions = {name for name in fttrain.__all__ if name.islower()}
    assert functions <= described, functions


def test_code_in_python_names_what_the_api_has() -> None:
    for page in CURRENT:
        for fence in doc_commands.FENCE.finditer(page.read_text(encoding="utf-8")):
            if fence["language"] == "python":
                ast.parse(fence["body"])
                assert set(re.findall(r"fttrain\.(\w+)", fence["body"])) <= set(fttrain.__all__)


def test_the_page_of_settings_has_every_option_and_key() -> None:
    page = generator().settings()
    for group, options in groups().items():
        for option in options:
            assert f"`{group}={option}`" in page
        if group not in ("experiment", "sweep"):
            for key in schema.keys_of(schema.lookup(RunConfig, [group])):
                assert f"`{group}.{key}`" in page or f"`{group}.{key}." in page, f"{group}.{key}"
    root = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    for key in root.keys() - {"defaults"}:
        assert f"| `{key}` |" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed: fttrain[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_page(site: Path) -> None:
    for page in (*DOCS.rglob("*.md"), DOCS / "settings.md", DOCS / "contributing.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page


@pytest.mark.slow
def test_no_page_fetches_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in loaded(page.read_text(encoding="utf-8")):
            assert not address.startswith(("http:", "https:", "//")), (page, address)


@pytest.mark.slow
def test_every_drawing_is_shown(site: Path) -> None:
    drawings = sorted((DOCS / "architecture").glob("*.svg"))
    assert len(drawings) == 5
    shown = "".join(page.read_text(encoding="utf-8") for page in site.glob("architecture/*.html"))
    assert all(f'src="{drawing.name}"' in shown for drawing in drawings)


@cache
def source() -> str:
    """All code of fttrain/."""
    files = sorted((ROOT / "fttrain").rglob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def loaded(html: str) -> Iterator[str]:
    """What a browser loads with a page: scripts, images, style sheets."""
    yield from re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?([^"\s>]+)', html)
    for link in re.findall(r"<link[^>]*>", html):
        if "canonical" not in link:
            yield from re.findall(r'href="?([^"\s>]+)', link)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_pages", DOCS / "generate_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
