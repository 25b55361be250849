"""The list of metrics as a person reads it."""

from __future__ import annotations

import pytest

from bitmar.observability.schema import TEMPLATES
from tools.metrics import COLUMNS, main, rows


def test_every_logged_metric_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for template in TEMPLATES:
        assert (template.name in printed) == (not template.of)


def test_a_group_alone_and_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Memory", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows("Memory"))
    assert all(line.startswith("| Memory/") for line in lines[2:])
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in lines)


def test_an_unknown_group_is_a_user_s_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Memories"]) == 2
    assert capsys.readouterr().err.startswith("error: no group 'Memories': choose from Training, Validation, Memory")
