"""What a run leaves for people: metrics and episodes as JSON lines, plots, and one self-contained page."""

from router_r1_jax.report.page import write_report
from router_r1_jax.report.plots import calls_per_model, em_against_cost, learning_curves, slots_over_time
from router_r1_jax.report.set_plots import calls_by_set, em_by_set
from router_r1_jax.report.table import results_table
from router_r1_jax.report.writer import EpisodeWriter, MetricsWriter, read_episodes, read_metrics, replace_file

__all__ = [
    "EpisodeWriter", "MetricsWriter", "calls_by_set", "calls_per_model", "em_against_cost", "em_by_set",
    "learning_curves", "read_episodes", "read_metrics", "replace_file", "results_table", "slots_over_time",
    "write_report",
]  # fmt: skip
