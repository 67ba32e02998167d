"""Verdicts and the list of rules that carry them. What is judged is said in `rules.py`, `conversations.py` and `validation.py`."""

from repro_assets.data.drift import DIGITS
from repro_assets.documents import Rule

PASS, WARN, FAIL, NONE = "pass", "warn", "fail", "none"
RECORDS, TOTALS, SAMPLE, DRIFT, EXPECTATIONS = "records", "totals", "sample", "drift", "expectations"
SHOWN = 20


class Judged:
    """Rules with their verdicts, and for those on records the ids of up to 20 records that fail."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.failing: dict[str, list[str]] = {}

    def add(self, group: str, name: str, verdict: str, effect: float | None, limit: float | None, detail: str) -> None:
        self.rules.append(Rule(group, name, verdict, None if effect is None else round(float(effect), DIGITS), limit, detail))

    @property
    def verdict(self) -> str:
        """fail before warn before pass; `none` is no verdict and does not count."""
        found = {rule.verdict for rule in self.rules}
        return next((verdict for verdict in (FAIL, WARN) if verdict in found), PASS)
