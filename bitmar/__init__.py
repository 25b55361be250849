"""The trainer: model, engine, observability, evaluation."""
