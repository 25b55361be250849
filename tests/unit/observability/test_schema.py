from __future__ import annotations

import dataclasses
import re

import pytest

from bitmar.config import ModelConfig
from bitmar.observability.schema import SCHEMA, STEP_METRIC, Cadence, Layout, Metric, Reduction, find, schema_of, select

GROUPS = {
    "Training",
    "Validation",
    "Memory",
    "Attention",
    "Features",
    "Quantization",
    "Gradients",
    "Model",
    "Throughput",
    "System",
    "Data",
}


def test_names_are_unique_and_grouped() -> None:
    names = [metric.name for metric in SCHEMA]
    assert len(set(names)) == len(names)
    for name in names:
        group, _, rest = name.partition("/")
        assert group in GROUPS
        assert re.fullmatch(r"[A-Z][A-Za-z]*(_([A-Z0-9][A-Za-z0-9]*|layer|per))*", rest), name


def test_every_metric_says_what_it_is() -> None:
    for metric in SCHEMA:
        assert metric.unit
        assert metric.meaning


def filled(cadence: Cadence) -> list[str]:
    return [m.name for m in select(SCHEMA, cadence) if m.reduction is not Reduction.DERIVED]


def test_cadences_split_the_schema() -> None:
    parts = [select(SCHEMA, cadence) for cadence in Cadence]
    assert sum(len(part) for part in parts) == len(SCHEMA)
    assert all(name.startswith("Validation/") for name in filled(Cadence.VALIDATION))
    assert STEP_METRIC in {metric.name for metric in select(SCHEMA, Cadence.STEP)}


def test_names_of_a_run_are_found_again_and_others_are_not() -> None:
    schema = schema_of(Layout(ranks=8, nodes=2, sources=("cc_3M", "gutenberg"), matrices=("a", "b")))
    for metric in schema:
        found = find(metric.name)
        assert found is not None
        assert (found.name, found.meaning, found.unit) == (metric.name, metric.meaning, metric.unit)
    assert find("Data/Source_Share_gutenberg") is not None
    assert find("Training/Other") is None
    assert {m.name for m in schema} >= {"System/Node_1_Memory_RSS", "Attention/Decoder_layer_2_Entropy"}


def test_arrays_have_the_sizes_of_the_run() -> None:
    model = ModelConfig(encoder_layers=5, heads=4, fusion_layers=2)
    shapes = {m.name: m.shape for m in schema_of(Layout(model, ranks=3, matrices=("a", "b")))}
    assert shapes["Attention/Heads_Encoder_Entropy"] == (5, 4)
    assert shapes["Attention/Heads_CrossModal_Importance"] == (2, 4)
    assert shapes["Attention/Heads_Memory_Importance"] == (1, 1)
    assert shapes["Throughput/Rank_Seconds"] == (3,)
    assert shapes["Quantization/Matrix_Plus"] == (2,)
    assert "Quantization/Matrix_Plus" not in {m.name for m in SCHEMA}  # a model without rounded matrices


def test_a_metric_is_frozen() -> None:
    metric = Metric("A/B", "s", Reduction.SUM, Cadence.STEP, "seconds")
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "C/D"  # pyright: ignore[reportAttributeAccessIssue]
