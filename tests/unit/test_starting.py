"""How processes are started: nothing in the working folder is found, by Python or by the search for a program."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedstream.cli.starting import environment, find_executable, python_command
from embedstream_producer.embedded.programs import find_program

ROOT = Path(__file__).parents[2]
PRODUCT = ("embedstream", "producer", "worker", "coordinator")
HOME = "embedstream/cli/starting.py"
STARTS = {"subprocess.Popen", "subprocess.run"}
FORBIDDEN = {
    *(f"subprocess.{name}" for name in ("call", "check_call", "check_output", "getoutput", "getstatusoutput")),
    *(f"os.{name}" for name in ("system", "popen", "posix_spawn", "posix_spawnp")),
    *(
        f"os.{kind}{ending}"
        for kind in ("exec", "spawn")
        for ending in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")
    ),
}
"""Ways to start a process that no test looks at."""


def parsed() -> Iterator[tuple[str, ast.AST]]:
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                yield where, node


def test_one_module_alone_names_the_interpreter_and_searches_for_programs() -> None:
    found = {where for where, node in parsed() if isinstance(node, ast.Attribute | ast.Name)
             and ast.unparse(node) in ("sys.executable", "shutil.which")}  # fmt: skip
    # A program that a package brings along is looked for in that package's own folder.
    assert found == {HOME, "producer/embedstream_producer/embedded/programs.py"}
    programs = (ROOT / "producer/embedstream_producer/embedded/programs.py").read_text("utf-8")
    assert "sys.executable" not in programs
    assert programs.count("shutil.which(") == programs.count('path=str(Path(folder) / "bin")') == 1


def test_every_process_gets_an_environment_made_for_it() -> None:
    calls = [(where, node) for where, node in parsed() if isinstance(node, ast.Call)]
    started = [(where, call) for where, call in calls if ast.unparse(call.func) in STARTS]
    assert len(started) >= 6
    for where, call in started:
        assert "env" in {keyword.arg for keyword in call.keywords}, f"{where}:{call.lineno}"
    assert [(where, call.lineno) for where, call in calls if ast.unparse(call.func) in FORBIDDEN] == []


def test_empty_and_relative_entries_of_search_paths_reach_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, ":.:lib:/usr/bin::/bin:../x")
    made = environment()
    assert {made[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")} == {"/usr/bin:/bin"}
    assert made["PYTHONSAFEPATH"] == "1"
    monkeypatch.setenv("PYTHONPATH", "")
    assert "PYTHONPATH" not in environment()


def test_a_module_in_the_working_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "http.py").write_text("print('from here')")
    command = python_command("embedstream.metrics.metrics")
    assert "-P" in command
    code = "import http, subprocess, sys; subprocess.run([sys.executable, '-c', 'import http'], check=True)"
    command[command.index("-m") :] = ["-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout == ""


def test_a_program_in_the_working_folder_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ":.:bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    for name in ("redis-server", "valkey-server", "bin/redis-server", "only-here"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\necho 'Redis server v=99.1.0 sha=0'\n")
        program.chmod(0o755)
    assert find_executable("only-here") is None
    assert find_executable("sh") in ("/usr/bin/sh", "/bin/sh")
    assert str(tmp_path) not in find_program().command[0]
    assert not (tmp_path / "ran").exists()
