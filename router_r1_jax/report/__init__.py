"""What a run leaves for people: metrics and episodes as JSON lines, plots, and one self-contained page."""
