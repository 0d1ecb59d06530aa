"""The report: models fine-tuned on tasks, their updates measured, cut and compared."""
