"""Statistics of the whole cluster: schema, reduction, rank-0 sinks, plots."""
