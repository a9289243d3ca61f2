"""Report of a run: report page (HTML), learning curves and other plots. The results tables are in `report.tables`."""

from router_r1_jax.report.calls_plot import calls_per_model as calls_per_model
from router_r1_jax.report.cost_plot import em_against_cost as em_against_cost
from router_r1_jax.report.dataset_plots import calls_by_dataset as calls_by_dataset
from router_r1_jax.report.dataset_plots import em_by_dataset as em_by_dataset
from router_r1_jax.report.html_report import write_report as write_report
from router_r1_jax.report.learning_curves import learning_curves as learning_curves
from router_r1_jax.report.sweep_plot import sweep_plot as sweep_plot
from router_r1_jax.report.timeline_plot import slots_over_time as slots_over_time
