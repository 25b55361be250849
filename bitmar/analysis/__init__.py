"""Offline analysis of attention heads; nothing in the trainer imports it."""
