"""Results on disk: summary, history, tables and plots."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.report.progress import VirtualTimeProgress
    from flwr_moe.report.records import HistoryRow, Results, ResultsError, RunRecord
    from flwr_moe.report.results import ResultsFolder, load_results, write_results

__getattr__, __dir__ = lazy_exports(__name__, __file__)
