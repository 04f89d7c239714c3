"""The command line: what reaches the run, exit codes and one-line errors."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from flwr_moe.app.settings import Settings
from flwr_moe.cli import main
from flwr_moe.network import NothingTrained
from flwr_moe.report import write_results
from tests.report.fakes import fake_run

Call = tuple[list[str], Settings, list[int], Path]
PASSES = ["passes", "--constellation", "delta-4", "--start", "2026-01-01T00:00:00Z"]
KEYS = ["satellite", "site", "rise", "culmination", "set"]
KEYS += ["max-elevation-deg", "open-start", "open-end"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Stand in for the runs; return what they were asked for."""
    made: list[Call] = []

    def run_compare(systems: list[str], settings: Settings, seeds: list[int], out: Path) -> int:
        made.append((systems, settings, seeds, out))
        return 0

    module = types.ModuleType("flwr_moe.app.compare")
    module.run_compare = run_compare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_moe.app.compare", module)
    return made


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single line on standard error, without the common start."""
    (line,) = capsys.readouterr().err.splitlines()
    start = "flwr-moe: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


def test_demo(calls: list[Call]) -> None:
    assert main(["demo"]) == 0
    assert main(["demo", "--out", "x/y"]) == 0
    systems = ["ems-fl", "fedavg", "fedasync"]
    assert calls == [
        (systems, Settings(), [0], Path("runs/demo")),
        (systems, Settings(), [0], Path("x/y")),
    ]


def test_compare_defaults(calls: list[Call]) -> None:
    assert main(["compare", "fedavg", "ems-fl", "fedavg"]) == 0
    assert calls == [(["fedavg", "ems-fl"], Settings(system="fedavg"), [0], Path("runs/compare"))]


def test_compare_flags_and_settings(calls: list[Call], tmp_path: Path) -> None:
    flags = ["--seeds", "3", "--links", "fixed", "--task", "digits", "--data", str(tmp_path)]
    settings = ["--set", "seed=5", "--set", "ems-fl.gate=linear", "--set", "horizon-hours=2"]
    assert main(["compare", "ems-fl", *flags, *settings, "--out", "o"]) == 0
    ((systems, got, seeds, out),) = calls
    assert (systems, seeds, out) == (["ems-fl"], [5, 6, 7], Path("o"))
    assert got == Settings(
        seed=5, links="fixed", data=str(tmp_path), ems_fl_gate="linear", horizon_hours=2.0
    )


def test_exit_code_of_the_run_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flwr_moe.app.compare")
    module.run_compare = lambda *_: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_moe.app.compare", module)
    assert main(["demo"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["bogus"], "'bogus'"),
        (["serve", "--port", "1"], "--folder"),
        (["compare"], "SYSTEM"),
        (["compare", "emu"], "system='emu' is unknown (did you mean emo?)"),
        (["compare", "fedavg", "ems-lf"], "did you mean ems-fl?"),
        (["compare", "ems-fl", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["compare", "ems-fl", "--seeds", "x"], "--seeds"),
        (["compare", "ems-fl", "--set", "seed"], "expected KEY=VALUE"),
        (["compare", "ems-fl", "--set", "sed=1"], "did you mean seed?"),
        (["compare", "ems-fl", "--set", "system=fedavg"], "name the systems as arguments"),
        (["compare", "ems-fl", "--links", "wire"], "links='wire' is unknown"),
        (["compare", "ems-fl", "--data", "/no/such"], "data='/no/such': no such folder"),
        (["report", "/no/such"], "summary.json' is missing"),
        ([*PASSES, "--hours", "1"], "--site"),
        ([*PASSES, "--hours", "1", "--site"], "--site"),
        ([*PASSES, "--hours", "1", "--site", "91,0"], "site '91,0': latitude"),
        ([*PASSES, "--hours", "1", "--site", "0,-181"], "site '0,-181': longitude"),
        ([*PASSES, "--hours", "1", "--site", "here"], "site 'here'"),
        ([*PASSES, "--hours", "0", "--site", "0,0"], "hours"),
        ([*PASSES, "--hours", "nan", "--site", "0,0"], "hours"),
        ([*PASSES, "--hours", "1e15", "--site", "0,0"], "hours = 1e+15, expected more than 0"),
        ([*PASSES, "--hours", "8785", "--site", "0,0"], "at most 8784 (366 days)"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--min-elevation", "90"], "elevation"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--min-elevation=-1"], "elevation"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--start", "soon"], "--start='soon'"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--start", "2026-01-01T00:00:00"],
         "--start='2026-01-01T00:00:00': expected a time zone"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--constellation", "detla-4"], "detla-4"),
        ([*PASSES, "--hours", "1", "--site", "0,0", "--json", "/no/such/f"], "/no/such/f"),
        ([*PASSES, "--elements", "f", "--hours", "1", "--site", "0,0"], "not allowed with"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    calls: list[Call],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 2
    assert message in error_line(capsys)
    assert calls == []


def test_error_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise ValueError("first\n  second")

    module = types.ModuleType("flwr_moe.app.compare")
    module.run_compare = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_moe.app.compare", module)
    assert main(["demo"]) == 2
    assert error_line(capsys) == "first second"


def test_a_run_that_trains_nothing_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    module = types.ModuleType("flwr_moe.app.compare")
    module.run_compare = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_moe.app.compare", module)
    error: RuntimeError = NothingTrained("all 4 replies of round 1 are errors")
    assert main(["demo"]) == 1
    assert error_line(capsys) == "all 4 replies of round 1 are errors"
    # A mistake of the program keeps its traceback.
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])


def test_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    module = types.ModuleType("flwr_moe.app.compare")
    module.run_compare = interrupt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_moe.app.compare", module)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "flwr-moe: interrupted\n"


@pytest.mark.parametrize("sites", [["--site", "-33.9,18.4", "48.1,11.6,500"],
                                   ["--site", "-33.9,18.4", "--site=48.1,11.6,500"]])  # fmt: skip
def test_passes_json(sites: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "passes.json"
    assert main([*PASSES, *sites, "--hours", "6", "--json", str(target)]) == 0
    records = json.loads(target.read_text())
    assert {record["site"] for record in records} == {"-33.9,18.4", "48.1,11.6,500"}
    for record in records:
        assert list(record) == KEYS
        assert record["rise"] <= record["culmination"] <= record["set"]
        assert record["rise"].startswith("2026-01-01T0")
        assert record["max-elevation-deg"] >= 10.0
    printed = capsys.readouterr().out
    assert f"{len(records)} passes" in printed
    assert records[0]["rise"][:19] in printed
    assert records[0]["satellite"] in printed


def test_passes_mask_and_plot(tmp_path: Path) -> None:
    counts = []
    for mask in ("0", "40"):
        target = tmp_path / "passes.json"
        site = ["--site", "48.1,11.6", "--hours", "6", "--min-elevation", mask]
        plot = tmp_path / "plot.png"
        assert main([*PASSES, *site, "--json", str(target), "--plot", str(plot)]) == 0
        assert plot.read_bytes().startswith(b"\x89PNG")
        counts.append(len(json.loads(target.read_text())))
    assert counts[0] > counts[1]


ISS = [
    "ISS (ZARYA)",
    "1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927",
    "2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537",
]


def elements_arguments(path: Path, start: str = "2008-09-20T12:00:00Z") -> list[str]:
    search = ["--site", "48.1,11.6", "--start", start, "--hours", "24"]
    return ["passes", "--elements", str(path), *search]


def test_passes_from_elements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target, plot = (tmp_path / name for name in ("iss.tle", "out.json", "out.png"))
    path.write_text("\n".join(ISS))
    arguments = [*elements_arguments(path), "--json", str(target), "--plot", str(plot)]
    assert main(arguments) == 0
    records = json.loads(target.read_text())
    # 51.6° of inclination over Munich: some six passes a day, in one run of revolutions.
    assert 4 <= len(records) <= 8
    assert {record["satellite"] for record in records} == {"ISS (ZARYA)"}
    assert list(records[0]) == KEYS
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "ISS (ZARYA)" in printed.out
    assert printed.err == ""


def test_old_elements_warn_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "iss.tle"
    path.write_text("\n".join(ISS))
    assert main(elements_arguments(path, "2008-10-20T14:00:00+02:00")) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flwr-moe: warning: VERY OLD ELEMENTS: ")
    assert "31.0 days" in line


@pytest.mark.parametrize(
    ("text", "start", "message"),
    [
        ("", "2008-09-20T12:00:00Z", "the file is empty"),
        ("\n".join(ISS[:2]), "2008-09-20T12:00:00Z", "line 2: the text ends before the second"),
        ("\n".join(ISS)[:-1], "2008-09-20T12:00:00Z", "line 3: 68 characters, expected 69"),
        ("\n".join(ISS)[:-1] + "8", "2008-09-20T12:00:00Z", "line 3: the checksum is 8"),
        ('[{"OBJECT_NAME": "X"}]', "2008-09-20T12:00:00Z", "record 1 ('X'): NORAD_CAT_ID is miss"),
        ('[{"OBJECT_NAME": "X"', "2008-09-20T12:00:00Z", "line 1: broken JSON"),
        ("<ndm><omm>", "2008-09-20T12:00:00Z", "line 1: broken XML"),
        ("EPOCH,BSTAR\n1", "2008-09-20T12:00:00Z", "line 2: 1 fields, expected 2"),
        ("\n".join(ISS), "2026-01-01T00:00:00Z", "epoch 2008-09-20T12:25:40Z is 17.3 years"),
        ("\n".join(ISS), "2008-09-20T12:00:00", "expected a time zone"),
    ],
)
def test_bad_elements_are_one_line_and_exit_code_2(
    text: str, start: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "elements"
    path.write_text(text)
    assert main(elements_arguments(path, start)) == 2
    assert message in error_line(capsys)


def test_absent_elements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(elements_arguments(tmp_path / "absent.tle")) == 2
    assert "absent.tle" in error_line(capsys)


def test_long_pass_tables_are_cut(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "passes.json"
    arguments = [*PASSES, "--site", "48.1,11.6", "--hours", "72", "--json", str(target)]
    assert main(arguments) == 0
    count = len(json.loads(target.read_text()))
    assert count > 40
    printed = capsys.readouterr().out
    assert printed.count("walker") == 40
    assert f"… and {count - 40} more" in printed


def test_report_rebuilds_table_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path, [fake_run()], {}, "digits", "satellite", 7200.0)
    rebuilt = ["results.md", "accuracy.png", "bytes.png", "passes.png"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in rebuilt:
        (tmp_path / name).unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    printed = capsys.readouterr().out
    assert "ems-fl" in printed
    assert "0.750" in printed


@pytest.mark.parametrize("command", ["demo", "compare", "passes", "report"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: flwr-moe {command}" in capsys.readouterr().out


def test_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("demo", "compare", "passes", "report"):
        assert command in text
    assert "serve" in text
    assert main(["compare", "--help"]) == 0
    assert "ems-fl.assignment" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flwr_moe.cli import main; main(['compare', '--help']);"
        "heavy = {'torch', 'flwr', 'numpy', 'matplotlib', 'skyfield', 'rich'} & set(sys.modules);"
        "sys.stderr.write(' '.join(sorted(heavy)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
