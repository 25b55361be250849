"""Writers of models for use outside this trainer."""
