"""What a behaviour's file may reach beyond this package. The user decides that, never the file.

A file may come from a stranger, and it can ask for a judge behind an endpoint. The user allows the hosts that prompts
may go to, and the key that goes with them, on the command line (`--allow-judge https://host --judge-key-env NAME`) or
in a settings file, `~/.config/rt_lens/settings.toml` or the one that `RT_LENS_SETTINGS` names:

    [judges]
    "https://api.openai.com" = "OPENAI_API_KEY"     # the variable that holds the key for this host
    "http://192.168.0.7:8000" = ""                  # no key is sent

This machine (localhost, 127.0.0.1, ::1) is always allowed and gets no key. These rules do not apply to judges that
Python code builds itself, with `EndpointJudge(...)` or `make_scorer({...})`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rt_lens.data.builtin import behaviours
from rt_lens.data.readers import read_toml
from rt_lens.evaluation.registry import ScorerLike
from rt_lens.models.sources import cache_home

_PORTS = {"http": 80, "https": 443}
# Narrow on purpose: two parsers of one address must not find two different hosts in it.
_ADDRESS = re.compile(
    r"(?i:(https?))://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::([0-9]{1,5}))?(/[\w./~-]*)?", re.ASCII | re.IGNORECASE
)
_THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Permissions:
    """Which judges behind endpoints a file may use.

    Attributes:
        judges: "https://host" or "https://host:port" -> environment variable with the key for it; empty for no key.

    Raises:
        ValueError: for something that is not an address.

    Example:
        >>> from pathlib import Path
        >>> table = {"kind": "endpoint_judge", "url": "https://api.openai.com/v1", "model": "m", "criterion": "is kind"}
        >>> allowed = Permissions({"https://api.openai.com": "OPENAI_API_KEY"})
        >>> allowed.checked(table, Path("mood.toml"))["api_key_env"]
        'OPENAI_API_KEY'
        >>> Permissions().checked(table, Path("mood.toml"))
        Traceback (most recent call last):
            ...
        ValueError: url must be on a host that you allow, got https://api.openai.com:443 in mood.toml. ...
    """

    judges: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for address, variable in self.judges.items():
            if _origin(address) is None or not isinstance(variable, str):
                raise ValueError(
                    "judges must be addresses such as 'https://api.openai.com' with the name of a variable, got "
                    f"{address!r} with {variable!r}. Leave the variable empty to send no key."
                )

    @classmethod
    def of_user(cls, allow: Sequence[str] = (), key_env: str | None = None) -> Permissions:
        """What the user's settings and the command line allow.

        Args:
            allow: addresses from the command line.
            key_env: the environment variable with the key for the one address in `allow`.

        Raises:
            ValueError: for an invalid settings file, or a key for no address or for several.
        """
        if key_env and len(allow) != 1:
            raise ValueError(
                f"judge_key_env must go with exactly one --allow-judge, got {len(allow)}. Name the host the key is for."
            )
        if key_env:
            return cls({**_settings(), allow[0]: key_env})
        return cls({**dict.fromkeys(allow, ""), **_settings()})  # for an address in both, the settings' key

    def checked(self, scorer: ScorerLike, file: Path) -> ScorerLike:
        """A file's scorer after the checks, with the key that the user allows for its judge.

        Args:
            scorer: the name or table in the file.
            file: the file.

        Raises:
            ValueError: for what the user does not allow; the message says how to allow it.
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
            return table  # building the judge raises an error that names the missing key
        if (origin := _origin(table["url"])) is None:
            raise ValueError(
                f"url must be a plain address such as 'http://localhost:8000/v1', got one in {file.name} with other "
                "characters, or with a key or password. Correct it there."
            )
        allowed = {_origin(address): variable for address, variable in self.judges.items()}
        scheme, host, port = origin
        address = f"{scheme}://{host}:{port}"
        if origin not in allowed and host not in _THIS_MACHINE:
            raise ValueError(
                f"url must be on a host that you allow, got {address} in {file.name}. If you trust it with your "
                f"model's responses, give --allow-judge {address} (with --judge-key-env NAME for a key), or add it to "
                f"{settings_file()}."
            )
        variable, requested = allowed.get(origin, ""), table.get("api_key_env", "")
        if requested and requested != variable:
            raise ValueError(
                f"api_key_env must be the variable that you allow for {address} "
                f"({repr(variable) if variable else 'no key'}), got {requested!r} in {file.name}. Leave the line out "
                f"there, or give --allow-judge {address} --judge-key-env {requested} if you trust both."
            )
        if "cache" in table:
            _check_cache(table["cache"], file)
        return {**table, "api_key_env": variable}


def settings_file() -> Path:
    """The user's settings file: `RT_LENS_SETTINGS` if set, else `~/.config/rt_lens/settings.toml`."""
    return Path(os.environ.get("RT_LENS_SETTINGS") or Path.home() / ".config" / "rt_lens" / "settings.toml")


def check_model(name: str, file: Path) -> None:
    """Refuses a model's name that is a network address, which Windows would open like a folder.

    Raises:
        ValueError: for a network address.
    """
    if name.startswith(("\\\\", "//", "\\/", "/\\")) or "://" in name or "\0" in name:
        raise ValueError(
            f"model must be a model's name or a local folder, got the network address {name!r} in {file.name}. Name it "
            "with --model if you trust it."
        )


def _settings() -> dict[str, str]:
    file = settings_file()
    if not file.is_file():
        return {}
    content = read_toml(file)
    judges = content.get("judges", {})
    if set(content) - {"judges"} or not isinstance(judges, Mapping):
        raise ValueError(f"settings must hold the table [judges] alone, got {', '.join(content)} in {file}.")
    if wrong := [address for address, variable in judges.items() if not isinstance(variable, str)]:
        raise ValueError(
            f"settings must name a variable for each judge, got none for {wrong[0]} in {file}. Give an empty one, as "
            'in "", to send no key.'
        )
    return dict(judges)


def _origin(url: Any) -> tuple[str, str, int] | None:
    """Scheme, host and port of an address; None for anything else, or an address with more than these and a path."""
    match = _ADDRESS.fullmatch(url) if isinstance(url, str) else None
    if match is None:
        return None
    scheme, host = match[1].lower(), match[2].lower()
    return scheme, host, int(match[3] or _PORTS[scheme])


def _check_cache(cache: Any, file: Path) -> None:
    """Refuses a cache outside the cache folder: it is written to, and a stranger may not choose where."""
    home = cache_home().expanduser().resolve()
    if not isinstance(cache, str) or not Path(cache).expanduser().resolve().is_relative_to(home):
        raise ValueError(
            f"cache must be a file in {home}, got {cache!r} in {file.name}. Leave it out, or set RT_LENS_CACHE to the "
            "folder of the cache."
        )


def _check_pairs(pairs: str, file: Path) -> None:
    """Allows a classifier the pairs of a built-in behaviour, or a file beside this file or in the working folder."""
    if pairs in behaviours():
        return
    check_model(pairs, file)
    path = Path(pairs).resolve()
    if not any(path.is_relative_to(folder.resolve()) for folder in (Path(), file.parent)):
        raise ValueError(
            f"pairs must be a built-in behaviour, or a file in the folder of {file.name} or below it, got {pairs!r}. "
            "Copy it there."
        )
