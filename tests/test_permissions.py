"""What a stranger's behaviour may reach: no file, host or key that its user has not allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from chat_server import HAPPY, alone
from typer.testing import CliRunner

from rt_lens.apps.cli import app, main
from rt_lens.common.files import as_name, check_name
from rt_lens.evaluation.permissions import Permissions, settings_file
from rt_lens.evaluation.registry import make_scorer
from rt_lens.experiment.config import load_experiment

PAIRS = """
[pairs]
positive = ["You are glad."]
negative = ["You are sad."]
topics = ["Rain?", "Snow?", "Fog?", "Sun?", "Ice?", "Sea?", "Air?", "Oak?", "Elm?", "Ash?"]
"""
SECRET = "sk-secret-0123456789"
HOSTILE = [
    "../evil", "a/b", "a\\b", "/etc/evil", "..", ".", ".hidden", "", " ", "a\0b", "a\nb", "x" * 101, "ü" * 120, "con",
    "NUL", "Com1", "lpt9.txt", "aux .x", "c:evil", "mood.", "mood ", " mood", "-rf", "a*b", "a?b", 'a"b', "a<b", "a|b",
    "\u202emood", "\u0301mood",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch) -> Path:
    """A place for the user's settings that is empty, and a cache folder."""
    monkeypatch.setenv("RT_LENS_SETTINGS", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "JUDGE_KEY"):
        monkeypatch.setenv(name, SECRET)
    return tmp_path / "settings.toml"


def toml(folder: Path, text: str, name: str = "b.toml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def judged(folder: Path, url: str, **more: Any) -> Path:
    lines = "".join(f"{key} = {value!r}\n" for key, value in {"url": url, **more}.items())
    table = f"[scorer]\nkind = 'endpoint_judge'\nmodel = 'someone'\ncriterion = 'sounds happy'\n{lines}"
    return toml(folder, PAIRS + table)


# Names


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_files_name_is_refused_when_it_is_read(tmp_path, name):
    escaped = "".join(f"\\U{ord(sign):08x}" for sign in name)
    file = toml(tmp_path, f'name = "{escaped}"\n{PAIRS}')
    with pytest.raises(ValueError, match=r"name in b\.toml must be 1 to 100 letters, digits, spaces and - _ \."):
        load_experiment(file)
    assert as_name(as_name(name)) == as_name(name)
    check_name(as_name(name), "name")


@pytest.mark.parametrize("name", [3, ["mood"], {"a": "b"}])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match="name must be 1 to 100 letters"):
        check_name(name, "name")


@pytest.mark.parametrize(
    "name", ["mood", "honesty_paper", "My mood 2.1", "ünï-cöde", "mood.v2", "気分", "हिन्दी", "_x", "2b"]
)
def test_a_plain_name_is_left_as_it_is(tmp_path, name):
    assert load_experiment(toml(tmp_path, f'name = "{name}"\n{PAIRS}')).name == name


def test_a_files_own_name_becomes_one_where_it_is_none(tmp_path):
    assert load_experiment(toml(tmp_path, PAIRS, "my mood (2).toml")).name == "my mood _2_"
    assert load_experiment(toml(tmp_path, PAIRS, "..mood.toml")).name == "mood"


@pytest.mark.parametrize("command", ["run", "extract", "tune"])
def test_a_command_writes_nothing_for_a_name_that_leads_elsewhere(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    file = toml(tmp_path, f'name = "../../evil"\n{PAIRS}')
    more = ["v.safetensors"] if command == "tune" else []
    monkeypatch.setattr(sys, "argv", ["rt-lens", command, str(file), *more])
    with pytest.raises(SystemExit):
        main()
    assert "got '../../evil'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"work", "deep", "b.toml"}


# Judges


def test_a_judge_elsewhere_is_refused_until_its_host_is_allowed(tmp_path, own_settings):
    file = judged(tmp_path, "https://judge.example:8443/v1")
    says = r"url must be on a host that you allow, got https://judge\.example:8443 in b\.toml\..*--allow-judge"
    with pytest.raises(ValueError, match=says):
        load_experiment(file)
    for other in ("https://judge.example", "http://judge.example:8443", "https://example:8443"):
        with pytest.raises(ValueError, match=says):
            load_experiment(file, permissions=Permissions({other: "JUDGE_KEY"}))
    allowed = Permissions.of_user(["https://Judge.Example:8443"], "JUDGE_KEY")
    assert load_experiment(file, permissions=allowed).scorer["api_key_env"] == "JUDGE_KEY"
    own_settings.write_text('[judges]\n"https://judge.example:8443" = "JUDGE_KEY"\n')
    assert settings_file() == own_settings
    for permissions in (None, Permissions.of_user(["https://judge.example:8443"])):
        assert load_experiment(file, permissions=permissions).scorer["api_key_env"] == "JUDGE_KEY"


def test_the_port_of_the_scheme_need_not_be_written(tmp_path):
    for url, allowed in (
        ("https://a.example/v1", "https://a.example:443"),
        ("http://a.example:80", "http://a.example"),
    ):
        assert (
            load_experiment(judged(tmp_path, url), permissions=Permissions({allowed: ""})).scorer["api_key_env"] == ""
        )


@pytest.mark.parametrize("url", ["https://judge.example/v1", "http://localhost:8000/v1"])
def test_a_file_does_not_say_which_variable_is_sent(tmp_path, url):
    file = judged(tmp_path, url, api_key_env="AWS_SECRET_ACCESS_KEY")
    host = url.removesuffix("/v1")
    for permissions in (Permissions({host: ""}), Permissions({host: "JUDGE_KEY"})):
        with pytest.raises(ValueError, match=r"api_key_env must be .*, got 'AWS_SECRET_ACCESS_KEY' in b\.toml"):
            load_experiment(file, permissions=permissions)
    agreed = Permissions({host: "AWS_SECRET_ACCESS_KEY"})
    assert load_experiment(file, permissions=agreed).scorer["api_key_env"] == "AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize(
    "url",
    ["http://localhost@evil.example/v1", "http://localhost\\\\@evil.example/v1", "http://evil.example#@localhost/v1",
     "http://evil.example?localhost", "http://localhost\\t.evil.example", "http://[::1].evil.example/", "file:///etc/passwd",
     "http://localhost%2eevil.example/", "http:///v1", "http://", "//localhost/v1", "http://löcalhost/v1"],
)  # fmt: skip
def test_an_address_that_two_readers_may_read_two_ways_is_refused(tmp_path, url):
    file = toml(tmp_path, f"{PAIRS}[scorer]\nkind = 'endpoint_judge'\nmodel = 'm'\ncriterion = 'c'\nurl = \"{url}\"\n")
    with pytest.raises(ValueError, match="url must be a plain address"):
        load_experiment(file)


@pytest.mark.parametrize("host", ["localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "127.1", "2130706433",
                                  "[::ffff:7f00:1]", "localhost.", "169.254.169.254"])  # fmt: skip
def test_only_this_machine_by_its_plain_names_is_allowed_unasked(tmp_path, host):
    with pytest.raises(ValueError, match="url must be on a host that you allow"):
        load_experiment(judged(tmp_path, f"http://{host}/v1"))


def test_a_judge_on_this_machine_is_asked_without_a_key(tmp_path, serve):
    came = serve(lambda _: "5")
    experiment = load_experiment(judged(tmp_path, came.url))
    assert make_scorer(experiment.scorer)(alone(HAPPY[:1])) == [1.0]
    assert [body["key"] for body in came] == ["Bearer none"]
    keyed = Permissions({came.url.removesuffix("/v1"): "JUDGE_KEY"})
    experiment = load_experiment(judged(tmp_path, came.url, seed=1), permissions=keyed)
    assert make_scorer(experiment.scorer)(alone(HAPPY[:1])) == [1.0]
    assert came[-1]["key"] == f"Bearer {SECRET}"


def test_the_judge_of_honesty_is_held_to_the_same(tmp_path):
    table = "[judge]\nurl = 'https://judge.example/v1'\nmodel = 'm'\ncriterion = 'is true'\n"
    file = toml(tmp_path, f"[honesty]\nprotocol = 'persona'\n{table}")
    with pytest.raises(ValueError, match="url must be on a host that you allow"):
        load_experiment(file)
    allowed = load_experiment(file, permissions=Permissions({"https://judge.example": "JUDGE_KEY"}))
    assert allowed.judge["api_key_env"] == "JUDGE_KEY" and "kind" not in allowed.judge


@pytest.mark.parametrize("cache", ["/etc/cron.d/x", "~/.bashrc", "../pairs.jsonl", "judge.jsonl", "/"])
def test_a_file_does_not_say_where_replies_are_written(tmp_path, cache):
    with pytest.raises(ValueError, match=r"cache must be a file in .*, got .* in b\.toml\. Leave it out"):
        load_experiment(judged(tmp_path, "http://localhost:1/v1", cache=cache))
    inside = str(tmp_path / "cache" / "mine.jsonl")
    assert load_experiment(judged(tmp_path, "http://localhost:1/v1", cache=inside)).scorer["cache"] == inside


def test_the_command_line_allows_one_host_and_its_key(tmp_path, serve):
    came = serve(lambda _: "5")
    scorer = toml(tmp_path, f"[scorer]\nkind='endpoint_judge'\nurl='{came.url}'\nmodel='m'\ncriterion='c'\n", "s.toml")
    asked = toml(tmp_path, "Rain?\n", "p.txt")

    def evaluate(*options: str) -> str:
        result = CliRunner().invoke(app, ["evaluate", str(asked), "--scorer", str(scorer), *options])
        return str(result.exception)

    host = came.url.removesuffix("/v1")
    scorer.write_text(scorer.read_text().replace("url=", "api_key_env='JUDGE_KEY'\nurl="))
    assert "(no key), got 'JUDGE_KEY' in s.toml" in evaluate()
    assert "got 0. Name the host the key is for" in evaluate("--judge-key-env", "JUDGE_KEY")
    several = ("--allow-judge", host, "--allow-judge", "https://b.example", "--judge-key-env", "JUDGE_KEY")
    assert "got 2. Name the host the key is for" in evaluate(*several)
    assert "judges must be addresses such as" in evaluate("--allow-judge", "b.example")
    assert "there is no model" not in evaluate(
        "--allow-judge", host, "--judge-key-env", "JUDGE_KEY", "--model", "nowhere/x"
    )
    assert not came  # nothing was asked while it was only read


@pytest.mark.parametrize(
    "text", ["judges = 3", "[judge]\n", "[judges]\nhere = 'X'", "[judges]\n'http://a' = 3", "[judges"]
)
def test_settings_that_are_none_are_named(tmp_path, own_settings, text):
    own_settings.write_text(text)
    with pytest.raises(ValueError, match=r"settings(\.toml| must)|judges must be addresses"):
        load_experiment("mood")


# Models and pairs


@pytest.mark.parametrize("name", ["\\\\host\\share\\m", "//host/share/m", "https://host/m", "smb://host/m"])
def test_a_model_on_the_network_is_refused(tmp_path, name):
    file = toml(tmp_path, f"{PAIRS}[model]\nname = '{name}'\n")
    with pytest.raises(ValueError, match="model must be a model's name or a local folder"):
        load_experiment(file)
    assert load_experiment(file, model=name).model == name  # the user's own word
    for kind in ("classifier", "logit_judge"):
        table = f"[scorer]\nkind = '{kind}'\nmodel = '{name}'\n"
        with pytest.raises(ValueError, match="model must be a model's name or a local folder"):
            load_experiment(toml(tmp_path, PAIRS + table))


def test_a_classifiers_pairs_lie_with_the_file_or_below(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def load(pairs: str) -> Any:
        table = f"[scorer]\nkind = 'classifier'\nmodel = 'm'\npairs = '{pairs}'\n"
        return load_experiment(toml(tmp_path / "theirs", PAIRS + table)).scorer["pairs"]

    for allowed in ("formality", "mine.csv", str(tmp_path / "theirs" / "pairs.csv")):
        assert load(allowed) == allowed
    for refused in ("/home/me/diary.csv", "../secret.csv", "//host/share/x.csv"):
        with pytest.raises(ValueError, match="pairs must be a built-in|model must be"):
            load(refused)
