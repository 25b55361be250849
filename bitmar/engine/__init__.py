"""Processes, DeepSpeed ZeRO, schedule, checkpoints, faults."""
