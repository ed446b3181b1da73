"""The built-in data set: questions about Python's own standard library, answered by its docstrings.

Modules are parsed, not imported, so nothing runs. Only built-in types and a few modules written in
C, whose docstrings are in no source file, are inspected as objects. The same Python gives the same
pairs in the same order.
"""

import ast
import builtins
import hashlib
import importlib
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fttrain.data.records import Located, RecordSource
from fttrain.util.errors import UserError

PAIRS = 2000
FEWEST = 500  # fewer pairs mean that the library's sources are missing
ANSWER_CHARS = (20, 600)

MODULES = """
abc argparse ast asyncio base64 bdb bisect bz2 calendar cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy
copyreg csv ctypes.util curses.ascii dataclasses datetime dbm decimal difflib dis doctest email
enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob
graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword
linecache locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers
opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib
posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter
runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3
ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile
tempfile textwrap threading timeit token tokenize tomllib trace traceback tracemalloc tty types
typing unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile
zipimport zoneinfo
""".split()  # noqa: SIM905 (a hundred quoted lines say no more)
# Written in C and without effects when imported.
COMPILED = "array binascii cmath errno gc itertools math select sys time unicodedata zlib".split()  # noqa: SIM905

QUESTIONS = {
    "module": (
        "What is the `{}` module for?",
        "What does the module `{}` provide?",
        "Describe the `{}` module.",
    ),
    "class": (
        "What is `{}`?",
        "What is the class `{}` for?",
        "Describe the class `{}`.",
        "What does `{}` represent?",
    ),
    "function": (
        "What does `{}` do?",
        "What is `{}` used for?",
        "Explain `{}`.",
        "What does the function `{}` do?",
    ),
    "method": (
        "What does `{}` do?",
        "What does the method `{}` do?",
        "Explain `{}`.",
        "What is the purpose of `{}`?",
    ),
}


@dataclass(frozen=True)
class Entry:
    """A documented name of the library."""

    kind: str  # module | class | function | method
    name: str  # dotted
    docstring: str


def stdlib_source(seed: int) -> RecordSource:
    """The source of about 2,000 question/answer pairs as chat records.

    The seed chooses the pairs and the wording of each question.
    """

    def read() -> Iterator[Located]:
        for number, (question, answer) in enumerate(pairs(seed), 1):
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            yield Located("stdlib", number, {"messages": turns})

    text = Path(__file__).read_bytes()  # this file's rules determine the data
    python = f"{platform.python_implementation()} {platform.python_version()}"
    build = f"{python} {hashlib.sha256(text).hexdigest()}"
    return RecordSource(f"stdlib\0{build}\0{seed}", read)


def pairs(seed: int = 0, count: int = PAIRS) -> list[tuple[str, str]]:
    """The (question, answer) pairs in an order by the seed: ``count`` of them or as many as there
    are, without duplicates. Raises UserError where the library's sources are missing.
    """
    # by answer: aliases and overridden methods share one docstring
    chosen: dict[str, tuple[str, str]] = {}
    names: set[str] = set()
    for entry in sorted(
        entries(), key=lambda entry: (entry.name.count("."), entry.name, entry.kind)
    ):
        answer = first_paragraph(entry.docstring)
        if answer is None or entry.name in names or answer.lower() in chosen:
            continue
        names.add(entry.name)
        forms = QUESTIONS[entry.kind]
        chosen[answer.lower()] = (
            forms[_number(seed, "form", entry.name) % len(forms)].format(entry.name),
            answer,
        )
    if len(chosen) < FEWEST:
        raise UserError(
            f"data=stdlib: only {len(chosen)} documented names were found in {_library()}: this "
            "Python comes without its library's sources; use data=file data.path=FILE"
        )
    return sorted(chosen.values(), key=lambda pair: _number(seed, "order", pair[0]))[:count]


def entries() -> Iterator[Entry]:
    """Yield every public documented name of the listed modules."""
    root = _library()
    for module in sorted(MODULES):
        file = root.joinpath(*module.split("."))
        if file.is_dir():
            for path in sorted(file.rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if not any(
                    part.startswith(("_", "test", "idle")) and part != "__init__" for part in parts
                ):
                    yield from _parse(path, ".".join(parts).removesuffix(".__init__"))
        elif file.with_suffix(".py").is_file():
            yield from _parse(file.with_suffix(".py"), module)
    for module in COMPILED:
        try:
            members = importlib.import_module(module)
        except ImportError:
            continue  # a Python built without it
        yield from _members(members, f"{module}.")
    yield from _members(builtins, "")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _parse(path: Path, module: str) -> Iterator[Entry]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # a template or a test of the parser
    yield Entry("module", module, ast.get_docstring(tree) or "")
    yield from _body(tree.body, module, "function")


def _body(body: list[ast.stmt], prefix: str, kind: str) -> Iterator[Entry]:
    for node in body:
        if not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield Entry("class", name, ast.get_docstring(node) or "")
            yield from _body(node.body, name, "method")
        else:
            yield Entry(kind, name, ast.get_docstring(node) or "")


def _members(owner: object, prefix: str) -> Iterator[Entry]:
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_"):
            continue
        if inspect.isclass(value):
            if not prefix or value.__module__ == prefix[:-1]:
                yield Entry("class", prefix + name, inspect.getdoc(value) or "")
                yield from _members(value, f"{prefix}{name}.")
        elif callable(value):
            kind = "method" if inspect.isclass(owner) else "function"
            yield Entry(kind, prefix + name, getattr(value, "__doc__", None) or "")


def first_paragraph(docstring: str) -> str | None:
    """The first paragraph on one line; None where it is unfit as an answer."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    answer = " ".join(paragraph.split())
    shortest, longest = ANSWER_CHARS
    if not shortest <= len(answer) <= longest or len(answer.split()) < 4:
        return None
    if not answer[0].isalpha() or not answer.isascii() or answer.endswith((":", ",", "...")):
        return None  # a list follows, or the sentence is cut off
    # Signatures, examples, markup, version-control lines and tests do not explain the name.
    if re.search(
        r"->|>>>|\$|::|={3}|-{3}|Internal|deprecated|XXX|TODO|not implemented",
        answer,
        re.IGNORECASE,
    ):
        return None
    if re.match(r"[\w.]+\(", answer):
        return None
    return answer if answer.endswith((".", "!", "?", ")")) else f"{answer}."


def _number(*parts: object) -> int:
    """A pseudo-random number that depends on ``parts`` alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
