"""The demo: generated support tickets, the evaluation suites made from them, and the tiny base model that learns to route them.

Nothing that the asset graph needs to work lives here; the graph reads the demo's data as it would read anybody's.
"""
