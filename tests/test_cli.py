from __future__ import annotations

import pytest

from ib_callback import __version__, cli, demo


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ib-callback {__version__}\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "required: command" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
@pytest.mark.parametrize("option", ["--steps", "--every", "--threads"])
def test_counts_must_be_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", f"{option}={value}"])
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_minutes_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", f"--minutes={value}"])
    assert "argument --minutes: " in capsys.readouterr().err


def test_options_reach_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: given.append(options))
    assert cli.main(["demo"]) == 0
    assert (
        cli.main(["demo", "--steps=7", "--minutes=0.5", "--every=2", "--output-dir=x", "--seed=3", "--threads=2"]) == 0
    )
    assert given[0] == {
        "steps": 600,
        "minutes": 3.0,
        "every": None,
        "output_dir": "ib_demo",
        "seed": 0,
        "threads": 1,
    }
    assert given[1] == {"steps": 7, "minutes": 0.5, "every": 2, "output_dir": "x", "seed": 3, "threads": 2}


def test_a_mistake_is_a_line_and_not_a_traceback(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{tmp_path}/file"
    open(file, "w").close()
    assert cli.main(["demo", "--output-dir", f"{file}/below"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ib-callback: cannot write to the output directory")
    assert "Traceback" not in error
