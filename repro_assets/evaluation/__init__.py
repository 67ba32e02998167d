"""Scoring models and deciding on them: suites, the scoring program, statistics, gate policy. Only `scoring` imports torch at module level, and `program` inside its functions."""
