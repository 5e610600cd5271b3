"""How an answer is written to a terminal."""

from __future__ import annotations

import os
import random
import re

import pytest

from octavo.services.cli import terminal

WIDTH = 20


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((WIDTH, 24)))
    return capsys


def lines_of(output: str) -> list[str]:
    """Return the lines of a screen after `output`, as a terminal draws it."""
    lines, column = [""], 0
    for back, erase, char in re.findall(r"\x1b\[(\d+)D|(\x1b\[K)|(.|\n)", output):
        if back:
            column -= int(back)
        elif erase:
            lines[-1] = lines[-1][:column]
        elif char == "\n":
            lines.append("")
            column = 0
        else:
            lines[-1] = lines[-1][:column] + char
            column += 1
    return lines


def test_words_are_whole_however_they_come(screen: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    for _ in range(200):
        words = ["".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(30)]
        text = " ".join(words)
        answer = terminal.Answer()
        while text:
            size = rng.randint(1, 5)
            answer.write(text[:size])
            text = text[size:]
        lines = lines_of(screen.readouterr().out)
        assert max(map(len, lines)) < WIDTH
        assert [word for line in lines for word in line.split()] == words


def test_what_is_longer_than_a_line_is_broken_and_nothing_is_lost(screen: pytest.CaptureFixture[str]) -> None:
    terminal.Answer().write("see " + "x" * 50 + " end")
    assert "".join(lines_of(screen.readouterr().out)).replace(" ", "") == "see" + "x" * 50 + "end"


def test_lines_of_code_are_left_as_they_are(screen: pytest.CaptureFixture[str]) -> None:
    text = "```\nfor number in range(1000): print(number)\n```\n"
    terminal.Answer().write(text)
    assert screen.readouterr().out == text


def test_wide_characters_take_two_columns(screen: pytest.CaptureFixture[str]) -> None:
    terminal.Answer().write("漢" * 25)
    assert [len(line) for line in lines_of(screen.readouterr().out)] == [9, 9, 7]


def test_a_remark_stands_in_a_line_of_its_own_and_is_made_once(screen: pytest.CaptureFixture[str]) -> None:
    answer = terminal.Answer()
    answer.write("Half a")
    answer.remark("connection lost")
    answer.remark("connection lost")
    answer.write(" word")
    assert re.sub(r"\x1b\[\dm", "", screen.readouterr().out) == "Half a\nconnection lost\n word"


def test_a_pipe_gets_the_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.Answer().write("word " * 50)
    assert capsys.readouterr().out == "word " * 50


@pytest.mark.parametrize(("given", "text"), [("plain é", "plain é"), ("\udcc3\udca9", "é"), ("a\udcff", "a�")])
def test_bytes_that_python_kept_as_half_characters_are_read_as_utf_8(given: str, text: str) -> None:
    assert terminal.as_text(given) == text
