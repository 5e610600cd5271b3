from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from octavo.services.common.config import ConfigError, flags, format_bytes, load, parse, parse_bytes, parse_duration


@dataclass(frozen=True)
class Config:
    model: Path = field(metadata={"positional": True, "help": "the model's folder"})
    grpc_address: str = field(default="127.0.0.1:1", metadata={"help": "where to listen", "group": "listening"})
    max_running: int = field(default=8, metadata={"help": "most sequences, 100% of them"})
    rate: float = 0.5
    reflection: bool = True
    weights: tuple[str, ...] = field(default=(), metadata={"help": "shares"})
    stop: tuple[str, ...] = field(default=(), metadata={"verbatim": True})
    cache: int = field(default=1 << 20, metadata={"kind": "bytes"})
    grace_s: float = 30.0
    wait_ms: int = 100
    level: str = field(default="info", metadata={"choices": ("debug", "info")})
    mode: Literal["a", "b"] = "a"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError("max_running must be\nat least 1")


def make(*argv: str, **environ: str) -> Config:
    return parse(Config, argv, prog="octavo test", environ=environ)


def test_a_default_yields_to_the_file_that_to_the_environment_and_that_to_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("max-running: 2\ngrpc_address: file:1\nrate: 2\nmodel: from-file\n")

    config = make("--config", str(file), "--max-running=4", OCTAVO_MAX_RUNNING="3", OCTAVO_GRPC_ADDRESS="environment:1")

    assert config.max_running == 4
    assert config.grpc_address == "environment:1"
    assert config.rate == 2.0
    assert config.model == Path("from-file")
    assert config.level == "info"


@dataclass(frozen=True)
class Renamed:
    max_num_seqs: int = field(default=8, metadata={"help": "most sequences", "was": "max_running"})


def test_a_setting_goes_on_working_under_its_old_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("max-running: 2\n")

    def read(*argv: str, **environ: str) -> int:
        return parse(Renamed, argv, prog="octavo test", environ=environ).max_num_seqs

    assert read("--max-running=3", OCTAVO_MAX_RUNNING="4") == 3
    assert read("--config", str(file), OCTAVO_MAX_RUNNING="4") == 4
    assert read(OCTAVO_MAX_RUNNING="4", OCTAVO_MAX_NUM_SEQS="5") == 5
    assert read("--config", str(file)) == 2
    file.write_text("max-running: 2\nmax_num_seqs: 3\n")
    with pytest.raises(ConfigError, match="max_num_seqs is set twice"):
        read("--config", str(file))
    with pytest.raises(SystemExit):
        read("--help")
    assert "its old name max_running works as well" in " ".join(capsys.readouterr().out.split())


def test_every_type_is_read_from_every_source(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(
        "reflection: false\nweights: [a=1, b=2]\ncache: 2GB\ngrace_s: 1m\nwait_ms: 2s\n"
        "limit: 5\nmode: b\nstop: ['x,y']\n"
    )

    from_file = make("m", "--config", str(file))
    from_flags = make(
        "m", "--no-reflection", "--weights=a=1,b=2", "--cache=2GB", "--grace-s=1m", "--wait-ms=2s", "--limit=5",
        "--mode=b", "--stop=x,y",
    )  # fmt: skip
    from_environment = make(
        "m",
        OCTAVO_REFLECTION="off",
        OCTAVO_WEIGHTS="a=1, b=2",
        OCTAVO_CACHE="2GB",
        OCTAVO_GRACE_S="60",
        OCTAVO_WAIT_MS="2000",
        OCTAVO_LIMIT="5",
        OCTAVO_MODE="b",
        OCTAVO_STOP="x,y",
    )

    assert from_file == from_flags == from_environment
    assert from_file.weights == ("a=1", "b=2")
    assert from_file.stop == ("x,y",)
    assert (from_file.cache, from_file.grace_s, from_file.wait_ms) == (2 * 10**9, 60.0, 2000)
    assert type(from_file.wait_ms) is int


def test_a_repeated_flag_adds_to_a_list() -> None:
    assert make("m", "--weights=a=1", "--weights", "b=2").weights == ("a=1", "b=2")


def test_an_empty_variable_is_no_setting() -> None:
    assert make("m", OCTAVO_MAX_RUNNING="").max_running == 8


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        ([], {}, "MODEL is missing: the model's folder"),
        (["m", "--max-runing", "3"], {}, "unknown option --max-runing; did you mean --max-running?"),
        (["m", "--max-run=3"], {}, "unknown option --max-run; did you mean --max-running?"),
        (["m", "n"], {}, "unexpected argument n"),
        (["m", "--max-running"], {}, "--max-running: needs a value"),
        (["m", "--max-running=x"], {}, "--max-running: must be a whole number, not 'x'"),
        (["m", "--max-running=1.5"], {}, "--max-running: must be a whole number, not '1.5'"),
        (["m", "--rate=nan"], {}, "--rate: must be a number, not 'nan'"),
        (["m", "--level=loud"], {}, "--level: must be one of debug, info, not 'loud'"),
        (["m", "--mode=c"], {}, "--mode: must be one of a, b, not 'c'"),
        (["m", "--cache=lots"], {}, "--cache: must be a size such as 512MiB or 2GB, not 'lots'"),
        (["m", "--grace-s=1 fortnight"], {}, "--grace-s: must be a time such as 30s"),
        (["m", "--wait-ms=1us"], {}, "--wait-ms: must be a whole number of ms"),
        (["m"], {"OCTAVO_MAX_RUNNING": "x"}, "OCTAVO_MAX_RUNNING: must be a whole number, not 'x'"),
        (["m"], {"OCTAVO_REFLECTION": "maybe"}, "OCTAVO_REFLECTION: must be true or false, not 'maybe'"),
        (["m", "--max-running=0"], {}, "max_running must be at least 1"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(*argv, **environ)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_runing: 3", "unknown setting 'max_runing'; did you mean max_running?"),
        ("zzz: 3", "unknown setting 'zzz'"),
        ("max_running: [3]", "max_running: must be a single value, not [3]"),
        ("max_running:", "max_running: must be a single value, not None"),
        ("max_running: true", "max_running: must be a whole number, not True"),
        ("weights: {a: 1}", "weights: must be a list of strings"),
        ("max_running: 1\nmax-running: 2", "max_running is set twice"),
        ("- a", "must hold a mapping of settings"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        make("m", "--config", str(file))

    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_and_an_empty_one_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        make("m", "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "empty.yaml").touch()
    assert make("m", "--config", str(tmp_path / "empty.yaml")).max_running == 8


def test_null_in_a_file_unsets_an_optional_setting(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("limit: null")
    assert make("m", "--config", str(tmp_path / "c.yaml")).limit is None


def test_load_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Config, ["m", "--rate=x"], prog="octavo test", environ={})

    assert caught.value.code == 2
    assert capsys.readouterr().err == "octavo test: --rate: must be a number, not 'x'\n"


def test_the_help_shows_groups_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Config, ["--help"], prog="octavo test", environ={})

    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "usage: octavo test [options] MODEL" in text
    assert "listening: --grpc-address ADDRESS where to listen (default: 127.0.0.1:1)" in text
    assert "100% of them (default: 8)" in text
    assert "--cache SIZE cache (default: 1 MiB)" in text
    assert "--reflection, --no-reflection" in text
    assert "(default: info; one of debug, info)" in text


def test_flags_are_read_back_as_they_were() -> None:
    values = {"max_running": 3, "reflection": False, "weights": ("a=1", "b=2"), "grpc_address": "", "limit": None}

    config = make("m", *flags(values))

    assert (config.max_running, config.reflection, config.weights) == (3, False, ("a=1", "b=2"))
    assert config.grpc_address == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("8Gi", 8 << 30), ("1k", 1000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1XB", "MiB", "1.2.3G", "one GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_bytes(text)


def test_durations_and_sizes_for_people() -> None:
    assert [parse_duration(text) for text in ("250ms", "30s", "1.5h")] == [0.25, 30.0, 5400.0]
    assert [format_bytes(size) for size in (512 << 20, 98_362_432, 10, 0)] == ["512 MiB", "98.4 MB", "10 B", "0 B"]
