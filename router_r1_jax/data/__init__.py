"""Question data sets: download, FlashRAG JSONL, TFDS builder, splits, decontamination and the question iterator."""
