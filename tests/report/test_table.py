"""The final table."""

import io
from pathlib import Path

from rich.console import Console

from flwr_moe.report import Results, RunRecord, write_results
from flwr_moe.report.table import headings, markdown_table, print_table, summary_rows
from tests.report.fakes import fake_run


def results(tmp_path: Path, *runs: RunRecord) -> Results:
    return write_results(tmp_path, runs, {}, "digits", "satellite", 7200.0)


def test_one_seed(tmp_path: Path) -> None:
    (row,) = summary_rows(results(tmp_path, fake_run()))
    expected = ["ems-fl", "0.500", "0.750", "1.0", "0.625", "0.00", "0.01", "0.5", "1.5", "1/0/2"]
    assert row == expected


def test_several_seeds_give_mean_and_standard_deviation(tmp_path: Path) -> None:
    both = results(tmp_path, fake_run(seed=0), fake_run(seed=1, lift=0.1))
    (row,) = summary_rows(both)
    # Initial accuracies 0.5 and 0.6: mean 0.55, deviation 0.1 / sqrt(2) = 0.0707.
    assert row[headings(both).index("initial")] == "0.550 ± 0.071"
    assert row[-1] == "2/0/4"


def test_values_no_run_has_are_dashes(tmp_path: Path) -> None:
    run = fake_run()
    del run.summary["uplink-bytes-per-update"]
    written = results(tmp_path, run)
    (row,) = summary_rows(written)
    assert row[headings(written).index("kB per update")] == "–"


def test_markdown_has_a_cell_for_every_heading(tmp_path: Path) -> None:
    both = results(tmp_path, fake_run(), fake_run("fedavg"))
    text = markdown_table(both)
    assert text == (tmp_path / "results.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {len(headings(both)) + 1}
    assert text.startswith("# digits over satellite links, 2 h, seed 0\n")


def test_terminal_table_cuts_no_word(tmp_path: Path) -> None:
    both = results(tmp_path, fake_run(), fake_run("fedavg"))
    for width in (80, 160):
        out = io.StringIO()
        print_table(both, Console(file=out, width=width))
        text = out.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        for word in " ".join(headings(both)).split():
            assert word in text
        for value in ("ems-fl", "fedavg", "0.750", "0.625", "1/0/2"):
            assert value in text


def test_rare_columns_show_only_where_some_run_has_them(tmp_path: Path) -> None:
    plain, personal = fake_run("fedavg"), fake_run("fedmoe-da")
    plain.summary["peer-bytes"], personal.summary["peer-bytes"] = 0, 2_500_000
    assert "peer MB" not in headings(results(tmp_path, plain))
    (tmp_path / "both").mkdir()
    both = results(tmp_path / "both", plain, personal)
    place = headings(both).index("peer MB")
    assert [row[place] for row in summary_rows(both)] == ["–", "2.50"]
    assert "after a local round" not in headings(both)
