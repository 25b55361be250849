"""What ranks that are forked from a server of processes find imported."""

LATE_IMPORTS = "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"  # what the start of an engine imports
