"""Files of a run: Orbax checkpoints, the metrics writer, and JSON lines."""
