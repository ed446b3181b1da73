"""The redaction of keys and tokens, so that none reaches a file, a log or a tracker."""

import os
import re

REDACTED = "[redacted]"

_NAME = re.compile(
    r"(?:^|[._\-/])(?:\w*_)?(?:api_?key|secret|passw(?:or)?d|token|credentials?)(?:$|[._\-])", re.I
)
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
    r"|wandb_v\d+_\w{20,}|AKIA[0-9A-Z]{16})"
)
_HEX_KEY = re.compile(r"[0-9a-f]{40}")  # a W&B key; a git commit looks the same
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def is_secret(name: str, value: str) -> bool:
    """Whether a setting called ``name`` with this ``value`` reveals a secret."""
    return bool(_NAME.search(name)) or redact(value, name) != value


def redact(text: str, name: str = "") -> str:
    """``text`` without keys, tokens, passwords in URLs and the values of secret environment
    variables.

    ``name`` is the dotted key the text belongs to: its name alone may make all of it a secret.
    """
    if text and _NAME.search(name):
        return REDACTED
    if _HEX_KEY.fullmatch(text) and not name.endswith("revision"):
        return REDACTED
    for variable, value in os.environ.items():
        if _NAME.search(variable) and len(value) >= 8:
            text = text.replace(value, REDACTED)
    return _URL_PASSWORD.sub(REDACTED, _VALUE.sub(REDACTED, text))
