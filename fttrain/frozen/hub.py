"""Weight files of a repository on the hub, on the disk only for as long as they are needed.

A file is downloaded when its first tensor is read, compared with the SHA-256 that the hub states,
and deleted after its last tensor was read: a 70B model passes through a disk that could not hold
it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fttrain.frozen.cache import HELP
from fttrain.util.atomic_files import room_for, sha256
from fttrain.util.errors import UserError, first_line
from fttrain.util.locks import locked

CONFIGURATION = ("*.json", "*.model", "*.jinja", "*.txt")  # everything but the weights
SHAPES = ("config.json",)  # enough for a plan


def configuration(
    repository: str, revision: str | None, patterns: Sequence[str] = CONFIGURATION
) -> Path:
    """A folder with the configuration and the tokenizer of a repository, or those of its files that
    match ``patterns``, named by its commit.

    They come from the hub's own cache where the hub cannot be reached. Raises UserError where
    neither has them.
    """
    from huggingface_hub import snapshot_download

    with _errors_of(repository):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


class HubFiles:
    """Files of one commit, fetched into ``folder``. All ranks of a node share the folder."""

    def __init__(self, repository: str, commit: str, folder: Path) -> None:
        self._repository, self._commit, self._folder = repository, commit, folder

    def fetch(self, name: str) -> Path:
        """Download a file and verify it; an interrupted download goes on where it stopped.

        Raises UserError where the hub does not deliver it, or delivers other bytes than it states,
        and where ``folder`` cannot be written.
        """
        path = self._folder / name
        with room_for(self._folder, 0, f"{self._repository}/{name}", HELP):
            self._folder.mkdir(parents=True, exist_ok=True)
            with locked(self._folder / f".{name}.lock"):  # one rank downloads, the others wait
                if not path.is_file():
                    with _errors_of(f"{self._repository}/{name}"):
                        os.replace(self._download(name), path)
        return path

    def needed_bytes(self, names: set[str], count: int) -> int:
        """The bytes of the ``count`` largest of the files ``names`` that are not downloaded yet.

        Raises UserError where the hub does not state them.
        """
        from huggingface_hub import HfApi

        absent = {name for name in names if not (self._folder / name).is_file()}
        if not absent:
            return 0
        with _errors_of(self._repository):
            info = HfApi().model_info(self._repository, revision=self._commit, files_metadata=True)
        sizes = [file.size or 0 for file in info.siblings or [] if file.rfilename in absent]
        return sum(sorted(sizes)[-count:])

    def keep_only(self, names: set[str]) -> None:
        """Delete the downloaded files that are not among ``names``."""
        for path in self._folder.glob("*"):
            if path.is_file() and not path.name.startswith(".") and path.name not in names:
                with contextlib.suppress(OSError):  # a file that stays costs room, nothing else
                    path.unlink()

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _download(self, name: str) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        location: dict[str, Any] = {"filename": name, "revision": self._commit}
        incoming = self._folder / ".incoming"
        arrived = Path(hf_hub_download(self._repository, **location, local_dir=incoming))
        expected = get_hf_file_metadata(hf_hub_url(self._repository, **location)).etag or ""
        # The etag of a small file is git's own hash; that of every weight file is its SHA-256.
        if len(expected) == 64 and sha256(arrived) != expected:
            arrived.unlink()
            raise UserError(
                f"{self._repository}/{name}: the bytes that arrived are not those that the hub "
                f"names (SHA-256 {expected}); the same command downloads the file again"
            )
        return arrived


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turn every error of the hub's client, which has a dozen kinds, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.path={what}: not a folder here, and the hub did not deliver it "
            f"({first_line(error)}); check the id, the network, the disk and HF_TOKEN, or download "
            "it and give the folder"
        ) from error
