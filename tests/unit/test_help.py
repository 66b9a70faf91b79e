"""The one command, and what the help of every command has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from reference_page import commands

from embedstream.cli import main
from embedstream.cli.command import Command
from embedstream_worker.cache_cli import cache

BIN = Path(sys.executable).parent
ALL = {name: command for name, command in commands().items() if name != "embedstream"}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_examples_a_short_help_variables_and_the_place_of_the_docs(name: str) -> None:
    command = ALL[name]
    assert isinstance(command, Command)
    shown = CliRunner().invoke(command, ["-h"], prog_name=name)
    assert shown.exit_code == 0
    assert shown.output == CliRunner().invoke(command, ["--help"], prog_name=name).output
    assert command.examples
    for example in command.examples:
        assert example in shown.output
        assert name in example
    for expected in ("EMBEDSTREAM_MAX_ERRORS for", "docs/reference.md", "README.md"):
        assert expected in " ".join(shown.output.split())
    assert len(command.get_short_help_str(limit=200)) < 75


@pytest.mark.parametrize("name", ALL)
def test_every_group_of_options_names_options_and_every_option_is_shown_once(name: str) -> None:
    command = ALL[name]
    assert isinstance(command, Command)
    options = {param.name for param in command.params if isinstance(param, click.Option)}
    grouped = [option for names in command.groups.values() for option in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= options
    shown = CliRunner().invoke(command, ["--help"]).output
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert shown.count(f"  {', '.join(param.opts)} ") == 1, param.opts


def test_the_one_command_has_all_others_and_says_what_each_does() -> None:
    shown = CliRunner().invoke(main.embedstream, ["-h"]).output
    for name, command in ALL.items():
        short = name.removeprefix("embedstream ").removeprefix("embed-")
        assert f"  {short} " in shown
        loaded = main.embedstream.get_command(
            click.Context(main.embedstream, **main.embedstream.context_settings), short
        )
        assert loaded is command
    assert {name.removeprefix("embedstream ").removeprefix("embed-") for name in ALL} == set(main.COMMANDS)


@pytest.mark.parametrize("arguments", [["status"], ["verify", "nowhere"], ["submit", "nowhere.jsonl"], ["cancel"]])
def test_a_command_of_the_one_command_does_what_its_own_program_does(arguments: list[str], tmp_path: Path) -> None:
    def ran(*command: str) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    code, out, err = ran(str(BIN / "embedstream"), *arguments)
    own = ran(str(BIN / f"embed-{arguments[0]}"), *arguments[1:])
    assert (code, out, err.replace(f"embedstream {arguments[0]}", f"embed-{arguments[0]}")) == own
    assert code == 2


def test_a_command_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run([BIN / "embedstream", "embed"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "No such command 'embed'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_the_one_command(shell: str) -> None:
    done = subprocess.run(
        [BIN / "embedstream"],
        env={"_EMBEDSTREAM_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_EMBEDSTREAM_COMPLETE" in done.stdout


def test_completion_knows_commands_and_their_options() -> None:
    def completed(words: str) -> str:
        env = {"_EMBEDSTREAM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return subprocess.run([BIN / "embedstream"], env=env, capture_output=True, text=True, check=False).stdout

    assert "plain,verify" in completed("embedstream ver")
    assert "plain,--retry-failed" in completed("embedstream submit --ret")


def test_the_cache_is_shown_with_its_size_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "cache"))
    assert "0.0 MB  in" in CliRunner().invoke(cache, []).output
    (tmp_path / "cache" / "openvino" / "model").mkdir(parents=True)
    (tmp_path / "cache" / "openvino" / "model" / "model.bin").write_bytes(bytes(2_500_000))
    shown = CliRunner().invoke(cache, []).output
    assert "2.5 MB  openvino: models converted for this processor" in shown
    assert f"2.5 MB  in {tmp_path / 'cache'}" in shown
    (tmp_path / "cache" / "of the user").mkdir()
    assert ", now removed" in CliRunner().invoke(cache, ["--clear"]).output
    assert [left.name for left in (tmp_path / "cache").iterdir()] == ["of the user"]
