"""Scoring models and deciding on them: suites, the scoring program, statistics, gate policy.

Of these only `scoring` imports torch and lm-eval at module level, and `program` inside its functions.
"""
