"""Lines that a reader can take apart again, whatever a file was called."""

from __future__ import annotations

import json
import logging
import re

import pytest

from inference.log import Lines, line

FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)(?: |$)')


def parse(text: str) -> dict[str, str]:
    return {name: json.loads(value) if value.startswith('"') else value for name, value in FIELD.findall(text)}


def test_plain_values_stay_plain() -> None:
    assert (
        line(case="a.b-1", size="512×512×100", read_s=0.5, lesions=2)
        == "case=a.b-1 size=512×512×100 read_s=0.5 lesions=2"
    )


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'with "quotes"',
        "x\ncase=y status=done",
        "\x1b[31mred",
        "a\u2028b",
        "\udcff",
        "back\\slash",
        "",
        "x=1",
    ],
)
def test_no_name_forges_or_breaks_a_line(name: str) -> None:
    text = line(case=name, status="failed")
    assert text.isprintable()
    assert parse(text) == {"case": name, "status": "failed"}


def test_records_are_lines_too() -> None:
    record = logging.LogRecord("inference", logging.WARNING, "", 0, "%s is\nfull", ("cuda:0",), None)
    assert parse(Lines().format(record)) == {"level": "warning", "message": "cuda:0 is\nfull"}
