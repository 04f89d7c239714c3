"""``flwr-moe cuts``: the table on the terminal and as JSON."""

import argparse
import json
from pathlib import Path

import pytest

from flwr_moe.cli import cuts as cli_cuts


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli_cuts.add_arguments(parser)
    return cli_cuts.run(parser.parse_args(arguments))


def test_the_default_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cuts.json"
    assert run("--set", "num-experts=6", "--json", str(file)) == 0
    record, last = json.loads(file.read_text(encoding="utf-8"))
    # A stem from 64 pixels to 64 features before the mixture of experts.
    stem = 64 * 64 + 64
    assert (record["at"], last["at"]) == ("stem", "mix")
    assert (record["client-parameters"], record["client-bytes"]) == (stem, 4 * stem)
    assert record["client-flops"] == 2 * 64 * 64
    assert (record["activation-shape"], record["activation-bytes"]) == ([64], 256)
    shown = capsys.readouterr().out
    assert "cuts of the model of digits" in shown
    assert f"{stem:,} | {record['server-parameters']:,}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "task"),
        (["--set", "seed"], "setting 'seed': expected KEY=VALUE"),
        (["--data", "/no/such/folder"], "no such folder"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)
