"""The shipped recipe for gsm8k on real rows: the 400 that ship with the tests, or the whole file where it lies beside the checkout."""

from pathlib import Path

from repro_assets.bench import DEMO
from repro_assets.documents import KINDS
from repro_assets.shelf import SHARED_ASSETS
from repro_assets_tests.graph import Graph

RECIPE = DEMO.parent / "gsm8k.yaml"
WHOLE = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
SHIPPED = Path(__file__).parent / "data" / "gsm8k" / "train-400.jsonl"


def test_the_gsm8k_recipe_goes_from_real_rows_to_a_decision(graph: Graph) -> None:
    """S0.55, S3.5: real input through every stage; the licence of each source travels with its counts."""
    data = (WHOLE if WHOLE.exists() else SHIPPED).read_bytes()
    rows = len(data.splitlines())
    key = graph.import_({"train.jsonl": data}, to="gsm8k")
    chain = [asset for asset in KINDS if asset not in SHARED_ASSETS]
    for ran in (graph.run(None, recipe=RECIPE), graph.run(key, chain, RECIPE)):
        assert ran.success, ran.failure
    (source,) = graph.document(key, "records", "gsm8k").result.sources
    assert (source.license, source.read) == ("MIT", rows)
    assert source.read == source.kept + source.quarantined + source.duplicates + source.contaminated
    again = graph.document(key, "validation_report", "gsm8k").result.reproduction
    assert again.drawn == again.equal > 0
    losses = graph.document(key, "qlora_checkpoint", "gsm8k").observed.losses
    assert losses[-1][1] < losses[0][1]
    decision = graph.document(key, "promotion", "gsm8k").result
    assert decision.decision in ("promote", "hold")
    assert {verdict.items for verdict in decision.verdicts} == {440}
