"""What a behaviour's file may reach beyond this package: its user says so, never the file.

A file may come from a stranger. It can ask for a judge behind an endpoint; to which hosts prompts may go, and which key
goes with them, is set on the command line (`--allow-judge https://host --judge-key-env NAME`) or in the user's own
settings, `~/.config/rt_lens/settings.toml` or where `RT_LENS_SETTINGS` says:

    [judges]
    "https://api.openai.com" = "OPENAI_API_KEY"     # the variable that holds the key for this host
    "http://192.168.0.7:8000" = ""                  # none is sent

Hosts of this machine (localhost, 127.0.0.1, ::1) are allowed, and are sent no key. What Python code makes itself, with
`EndpointJudge(...)` or `make_scorer({...})`, is its own affair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rt_lens.data.builtin import behaviours
from rt_lens.data.contrast_pairs import read_toml
from rt_lens.evaluation.registry import ScorerLike
from rt_lens.models.sources import cache_home

_PORTS = {"http": 80, "https": 443}
# Narrow on purpose: two readers of one address must not find two hosts in it.
_ADDRESS = re.compile(
    r"(?i:(https?))://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::([0-9]{1,5}))?(/[\w./~-]*)?", re.ASCII | re.IGNORECASE
)
_HERE = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Permissions:
    """Which judges behind endpoints a file may use.

    Attributes:
        judges: "https://host" or "https://host:port" -> environment variable with the key for it; empty for none.

    Raises:
        ValueError: an address that is none.

    Example:
        >>> Permissions({"https://api.openai.com": "OPENAI_API_KEY"})
    """

    judges: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for address, variable in self.judges.items():
            if _origin(address) is None or not isinstance(variable, str):
                raise ValueError(
                    f"judges: must be addresses such as 'https://api.openai.com' with the name of a variable, got "
                    f"{address!r} with {variable!r}. Leave the variable empty where no key is wanted."
                )

    @classmethod
    def of_user(cls, allow: Sequence[str] = (), key_env: str | None = None) -> Permissions:
        """What the user's settings allow, and what was allowed on the command line beside it.

        Args:
            allow: addresses.
            key_env: the environment variable with the key for the one address in `allow`.

        Raises:
            ValueError: settings that are none, or a key for no address or for several.
        """
        if key_env and len(allow) != 1:
            raise ValueError(
                f"judge_key_env: must come with one --allow-judge, got {len(allow)}. Say which host the key is for."
            )
        if key_env:
            return cls({**_settings(), allow[0]: key_env})
        return cls({**dict.fromkeys(allow, ""), **_settings()})  # an address in both keeps the key of the settings

    def checked(self, scorer: ScorerLike, file: Path) -> ScorerLike:
        """A file's name or table of a scorer as it may be made: without what only the user says, and with their key.

        Args:
            scorer: what the file says.
            file: where it says so.

        Raises:
            ValueError: says what is not allowed, and how to allow it.
        """
        if not isinstance(scorer, Mapping):
            return scorer
        if isinstance(scorer.get("model"), str):
            check_model(scorer["model"], file)
        if scorer.get("kind") == "endpoint_judge":
            return self._judge(scorer, file)
        if isinstance(scorer.get("pairs"), str):
            _check_pairs(scorer["pairs"], file)
        return scorer

    def _judge(self, table: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
        if "url" not in table:
            return table  # made of it, the message says that it is missing
        if (origin := _origin(table["url"])) is None:
            raise ValueError(
                f"url: must be a plain address such as 'http://localhost:8000/v1', got one in {file.name} with other "
                "signs, or with a key or password. Correct it there."
            )
        allowed = {_origin(address): variable for address, variable in self.judges.items()}
        scheme, host, port = origin
        place = f"{scheme}://{host}:{port}"
        if origin not in allowed and host not in _HERE:
            raise ValueError(
                f"url: {file.name} asks to send answers to {place}, which must be allowed by you, and not by the file. "
                f"Give --allow-judge {place} (with --judge-key-env NAME for a key), or add it to {settings_file()}."
            )
        variable, wanted = allowed.get(origin, ""), table.get("api_key_env", "")
        if wanted and wanted != variable:
            raise ValueError(
                f"api_key_env: {file.name} asks to send the variable {wanted!r} to {place}, where you allow "
                f"{repr(variable) if variable else 'no key'}. Leave the line out there, or give --allow-judge {place} "
                f"--judge-key-env {wanted} if you trust both."
            )
        if "cache" in table:
            _check_cache(table["cache"], file)
        return {**table, "api_key_env": variable}


def settings_file() -> Path:
    """The user's own settings: `RT_LENS_SETTINGS` if set, else `~/.config/rt_lens/settings.toml`."""
    return Path(os.environ.get("RT_LENS_SETTINGS") or Path.home() / ".config" / "rt_lens" / "settings.toml")


def check_model(name: str, file: Path) -> None:
    """Refuses a model's name that is an address of the network, which Windows would open like a folder.

    Raises:
        ValueError: if it is one.
    """
    if name.startswith(("\\\\", "//", "\\/", "/\\")) or "://" in name or "\0" in name:
        raise ValueError(
            f"model: must be a model's name or a local folder, got {name!r} in {file.name}, an address of the network. "
            "Name it with --model if you trust it."
        )


def _settings() -> dict[str, str]:
    file = settings_file()
    if not file.is_file():
        return {}
    content = read_toml(file)
    judges = content.get("judges", {})
    if set(content) - {"judges"} or not isinstance(judges, Mapping):
        raise ValueError(f"settings: {file} must have the table [judges] alone, got {', '.join(content)}. Correct it.")
    if wrong := [address for address, variable in judges.items() if not isinstance(variable, str)]:
        raise ValueError(
            f"settings: {file} must name a variable for each of its judges, got none for {wrong[0]}. Leave it empty, "
            'as in "", where no key is wanted.'
        )
    return dict(judges)


def _origin(url: Any) -> tuple[str, str, int] | None:
    """Scheme, host and port of an address; None if it is none, or holds more than that and a path."""
    found = _ADDRESS.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        return None
    scheme, host = found[1].lower(), found[2].lower()
    return scheme, host, int(found[3] or _PORTS[scheme])


def _check_cache(cache: Any, file: Path) -> None:
    """Replies are appended there: a file may not say to which of the user's files."""
    home = cache_home().expanduser().resolve()
    if not isinstance(cache, str) or not Path(cache).expanduser().resolve().is_relative_to(home):
        raise ValueError(
            f"cache: must be a file in {home}, got {cache!r} in {file.name}. Leave it out, or say with RT_LENS_CACHE "
            "where the cache is."
        )


def _check_pairs(pairs: str, file: Path) -> None:
    """A classifier's pairs are a shipped behaviour's, or lie with the file or where the user works."""
    if pairs in behaviours():
        return
    check_model(pairs, file)
    place = Path(pairs).resolve()
    if not any(place.is_relative_to(folder.resolve()) for folder in (Path(), file.parent)):
        raise ValueError(
            f"pairs: must be a shipped behaviour, or a file in the folder of {file.name} or below it, got {pairs!r}. "
            "Copy it there."
        )
