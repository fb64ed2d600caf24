"""Learning curves in the terminal."""

import io
import sys

import numpy as np
import pytest

from dvrl_jax.viewing import text_curves


def test_a_rising_curve_rises_and_fits():
    drawn = text_curves.draw("result.true", [0, 500, 1000], [-10.0, 0.0, 10.0], columns=40, height=4, braille=False)
    title, *rows, axis = drawn.splitlines()
    assert title == "result.true" and axis.split() == ["0", "1,000", "steps"] and len(rows) == 4
    assert rows[0].startswith(" 10 |") and rows[-1].startswith("-10 |") and max(map(len, rows)) <= 40
    stars = [np.mean([place for place, letter in enumerate(row) if letter == "*"]) for row in rows]
    assert stars == sorted(stars, reverse=True) and all("*" in row for row in rows)


def test_braille_has_eight_dots_a_character():
    drawn = text_curves.draw("x", [0, 1], [0.0, 1.0], columns=30, height=3).splitlines()[1:-1]
    dots = [sum(bin(ord(letter) - 0x2800).count("1") for letter in row.partition("|")[2]) for row in drawn]
    assert min(dots) >= 4 and "\u2801" not in drawn[0].partition("|")[2][:2]


def test_values_that_are_missing_are_left_out():
    assert text_curves.draw("x", [5, 6], [np.nan, np.inf]) == "x: no values yet"
    assert text_curves.draw("x", [5, 6], [np.nan, 2.0], braille=False) == text_curves.draw(
        "x", [6], [2.0], braille=False
    )


@pytest.mark.parametrize(("columns", "width"), [("60", 59), ("1000000", 100), ("1", 20)])
def test_curves_are_as_wide_as_the_terminal_within_reason(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    text_curves.show("x", [0, 10**9], [0.5, 0.25])
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines[1:-1]} == {width} and "\u2800" in "".join(lines)


def test_a_terminal_without_braille_has_stars(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    text_curves.show("x", [0, 1], [0.0, 1.0])
    assert b"*" in stream.buffer.getvalue()
