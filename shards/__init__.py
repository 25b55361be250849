"""The data plane: records, tars, indexes, tokens, order, loader. Knows no model."""
