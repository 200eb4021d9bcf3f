"""Training of a small model: documents, presets, the trainer, `msa train`, evaluation."""
