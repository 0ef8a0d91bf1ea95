"""A run's results: files on disk, tables for a paper, and what changed between two runs. This room meets no model."""

from rt_lens.results.comparing import RunComparison, compare_runs
from rt_lens.results.schema import Results, check_no_run, checked, checked_file, files_of_run, load_results
from rt_lens.results.tables import efficient, to_latex, to_markdown
from rt_lens.results.writing import plain, tables_of, write_results, write_scores

__all__ = [
    "Results",
    "RunComparison",
    "check_no_run",
    "checked",
    "checked_file",
    "compare_runs",
    "efficient",
    "files_of_run",
    "load_results",
    "plain",
    "tables_of",
    "to_latex",
    "to_markdown",
    "write_results",
    "write_scores",
]
