"""Progress in virtual time."""

import io
import threading

from rich.console import Console

from flwr_moe.report import VirtualTimeProgress

HORIZON_S = 10 * 3600.0


def plain() -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, force_terminal=False, width=40)


def test_at_most_one_line_per_twentieth_of_the_horizon() -> None:
    out, console = plain()
    with VirtualTimeProgress(console) as progress:
        for step in range(1001):
            progress.update("ems-fl", step / 1000 * HORIZON_S, HORIZON_S)
    lines = out.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0].split(": ")[0] == "ems-fl"
    assert "10.0 of 10.0 h" in lines[-1]


def test_each_run_has_its_own_lines() -> None:
    out, console = plain()
    with VirtualTimeProgress(console) as progress:
        progress.update("a", 0.0, HORIZON_S)
        progress.update("b", 0.0, HORIZON_S)
        progress.update("a", 1.0, HORIZON_S)
    assert [line[0] for line in out.getvalue().splitlines()] == ["a", "b"]


def test_line_carries_accuracy_and_note_uncut_and_unstyled() -> None:
    out, console = plain()
    with VirtualTimeProgress(console) as progress:
        progress.update("run [seed 1]", 1800.0, HORIZON_S, accuracy=0.91234, note="[7 updates]")
    assert out.getvalue() == "run [seed 1]:   0.5 of 10.0 h  accuracy 0.912  [7 updates]\n"


def test_bars_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, force_interactive=True)
    with VirtualTimeProgress(console) as progress:
        progress.update("run [a]", 3600.0, HORIZON_S, note="[b]")
        progress.update("run [a]", HORIZON_S + 60.0, HORIZON_S, accuracy=0.5)
    text = out.getvalue()
    assert "run [a]" in text
    assert "10.0 of 10.0 h  accuracy 0.500" in text
    assert "━" in text


def test_updates_after_the_end_are_ignored_on_a_terminal() -> None:
    out = io.StringIO()
    progress = VirtualTimeProgress(Console(file=out, force_terminal=True))
    with progress:
        pass
    before = out.getvalue()
    progress.update("late", 0.0, HORIZON_S)
    assert out.getvalue() == before


def test_many_threads_do_not_tear_lines() -> None:
    out, console = plain()
    with VirtualTimeProgress(console) as progress:

        def work(label: str) -> None:
            for step in range(101):
                progress.update(label, step / 100 * HORIZON_S, HORIZON_S)

        threads = [threading.Thread(target=work, args=(f"run{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 * 21
    assert all(line.startswith("run") and line.endswith("of 10.0 h") for line in lines)
