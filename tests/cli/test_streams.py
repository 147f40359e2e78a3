"""Standard streams that are closed, broken or no UTF-8, for every command; options without effect."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35moe.cli import COMMANDS, WRITES_FILES, main, streams

FOLDER = "no-such-folder"  # is read after the streams
ARGUMENTS = {
    "generate": [FOLDER, "--prompt", "hi"], "chat": [FOLDER], "inspect": [FOLDER], "routing": [FOLDER, "--text", "-"],
    "convert": [FOLDER, "target"], "tiny": ["target"], "backends": [], "demo": [FOLDER],
}  # fmt: skip


def shell(line: str, folder: Path, text: bytes = b"") -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a line in which RUN is the program."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHON": sys.executable}
    line = line.replace("RUN", '"$PYTHON" -m qwen35moe')
    run = subprocess.run(["sh", "-c", line], input=text, capture_output=True, env=environment, cwd=folder, timeout=600)
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def test_every_command_is_tried_here() -> None:
    assert {*ARGUMENTS} >= {*COMMANDS} - {"adapter"}


def test_a_closed_standard_input_is_one_line(tmp_path: Path) -> None:
    for command in ("generate no --prompt -", "chat no", "routing no --text -"):
        status, out, err = shell(f"RUN {command} <&-", tmp_path)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("qwen35moe: standard input is closed: "), err


def test_a_closed_standard_output_is_one_line(tmp_path: Path) -> None:
    for command in (["generate", "no", "--prompt", "hi"], ["backends"]):
        status, out, err = shell(f"RUN {' '.join(command)} >&-", tmp_path)
        words = f"qwen35moe: standard output is closed: {command[0]} writes its result there\n"
        assert (status, out, err) == (2, "", words)


@pytest.mark.parametrize("command", ARGUMENTS)
def test_closed_streams_in_every_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without standard output only commands that write files run; without standard error nothing is printed elsewhere."""
    monkeypatch.chdir(tmp_path)
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", err)
    if command not in ("tiny",):
        assert main([command, *ARGUMENTS[command]]) == 2
        assert ("standard output is closed" in err.getvalue()) is (command not in WRITES_FILES)
        assert err.getvalue().count("\n") == 1
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    if command not in ("tiny", "backends"):
        assert main([command, *ARGUMENTS[command]]) == 2 and out.getvalue() == ""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", err)
    if command in ("chat", "routing"):
        assert main([command, *ARGUMENTS[command]]) == 2 and "standard input is closed" in err.getvalue()


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    """What a C library writes to standard error must not land in a file of ours."""
    program = "import os; from qwen35moe.cli import streams; streams.open_missing(); print(os.open(os.devnull, 0) > 2)"
    assert shell(f"""\"$PYTHON\" -c "{program}" 0<&- 2>&-""", tmp_path)[:2] == (0, "True\n")


def test_bytes_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a pipe in any locale, from a file, from the command line."""
    for locale in ("C.UTF-8", "C"):
        for command in ("generate no --prompt -", "routing no --text -"):
            status, out, err = shell(f"LC_ALL={locale} RUN {command}", tmp_path, b"ab\xff")
            assert (status, out, err.count("\n")) == (2, "", 1) and "standard input is no UTF-8 text: byte 0xff" in err, err
    (tmp_path / "text").write_bytes(b"ab\xfe")
    assert main(["routing", FOLDER, "--text", str(tmp_path / "text")]) == 2
    assert "text is no UTF-8 text: byte 0xfe at 2" in capsys.readouterr().err
    for command, option in (("chat", "--system"), ("demo", "--prompt"), ("generate", "--prompt")):
        assert main([command, FOLDER, option, "a\udcfe"]) == 2
        assert f"{option} is no UTF-8 text: byte 0xfe after 1 characters" in capsys.readouterr().err


def test_a_broken_pipe_and_a_full_disk(tmp_path: Path) -> None:
    """Neither ends in a traceback, nor in a second message when Python writes its buffers at the end."""
    status, _, err = shell("RUN --help | true", tmp_path)
    assert (status, err) == (0, "")
    status, _, err = shell("(RUN generate no --prompt hi; echo $? >status) 2>&1 | true", tmp_path)
    assert (tmp_path / "status").read_text() == "2\n" and err == ""
    if os.path.exists("/dev/full"):
        program = "from qwen35moe.cli import main, backends; import sys; backends.run = print; "
        program += "sys.exit(main(['backends']))"
        status, _, err = shell(f'"$PYTHON" -c "{program}" >/dev/full', tmp_path)
        assert status == 2 and err.count("\n") == 1 and "No space left" in err, err


def test_line_ends_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("é\r\nb\rc\n".encode())
    assert streams.read_file(str(tmp_path / "text")) == "é\nb\nc\n"


# ------------------------------------------------------------------------------------------------ options without effect

WITHOUT_EFFECT = [
    (["generate", FOLDER, "--prompt", "a", "--temperature", "0.5"], "--temperature has an effect only when sampling: add"),
    (["generate", FOLDER, "--prompt", "a", "--seed", "7"], "--seed has an effect only when sampling: add --sample"),
    (["chat", FOLDER, "--greedy", "--top-k", "7"], "--top-k has an effect only when sampling: leave --greedy out"),
    (["chat", FOLDER, "--greedy", "--seed", "7", "--min-p", "0.1"], "--min-p, --seed has an effect"),
    (["routing", FOLDER, "--text", "x", "--logits"], "--logits are written to the trace: add --out"),
]


@pytest.mark.parametrize("arguments,words", WITHOUT_EFFECT, ids=[words[:20] for _, words in WITHOUT_EFFECT])
def test_options_without_effect_are_errors(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option is described, and a number that the help names as default is the parser's, unless the command fills it in."""
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    actions = list(parser._actions)
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):  # each subcommand has a help of its own, and options
            assert len(action._choices_actions) == len(action.choices) and all(c.help for c in action._choices_actions)
            actions += [option for subcommand in action.choices.values() for option in subcommand._actions]
            continue
        assert action.help, f"{command} {action.option_strings}"
        named = re.search(r"default: (\d+)\)", action.help or "")
        assert not named or action.default is None or int(named[1]) == action.default, f"{command} {action.option_strings}"
