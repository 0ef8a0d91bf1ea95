"""A run's results: files on disk, tables for a paper, and what changed between two runs. This room meets no model."""

from rt_lens.results.comparing import RunComparison, compare_runs
from rt_lens.results.schema import Results, checked, load_results
from rt_lens.results.tables import efficient, to_latex, to_markdown
from rt_lens.results.writing import plain, tables_of, write_results, write_scores

__all__ = [
    "Results",
    "RunComparison",
    "checked",
    "compare_runs",
    "efficient",
    "load_results",
    "plain",
    "tables_of",
    "to_latex",
    "to_markdown",
    "write_results",
    "write_scores",
]
