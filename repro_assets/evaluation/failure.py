"""The failure bundle: what a person needs to see why a checkpoint was held, as one JSON value. Who is told is the notifier's business.

Item texts and model answers come from data and are shown in pages that render Markdown, so none leaves here unescaped. `verdicts` are the
document's own values, for machines.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from repro_assets.documents import GateVerdict
from repro_assets.evaluation.policy import Decision, flipped

SCHEMA = 1
LIMIT = 200
TEXT_LIMIT = 500

_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_SPECIAL = frozenset("\\`*_{}[]()#+-!|~$:@^=")
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def bundle(
    decision: Decision,
    samples: Iterable[Mapping[str, Any]],
    digests: Mapping[str, str],
    command: str,
    limit: int = LIMIT,
) -> dict[str, Any]:
    """The bundle as canonical-JSON-able values: decision, reasons, table of verdicts, up to `limit` flipped items (worst first) of
    `flipped_total`, digests of what was compared, one command that shows it again, and the same as Markdown.

    Raises ValueError for a command of more than one line, SampleError for a malformed table of samples.
    """
    if not command.strip() or len(command.splitlines()) != 1:
        raise ValueError(f"a failure bundle names one command on one line, not {command!r}")
    rows = flipped([dict(row) for row in samples])
    shown = [_item(row) for row in rows[:limit]]
    verdicts = [msgspec.to_builtins(verdict) for verdict in decision.verdicts]
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "decision": decision.decision,
        "reasons": [escape(reason, None) for reason in decision.reasons],
        "verdicts": verdicts,
        "flipped": shown,
        "flipped_total": len(rows),
        "lost_total": sum(1 for row in rows if row["candidate"]["score"] < row["baseline"]["score"]),
        "digests": dict(sorted(digests.items())),
        "command": command,
    }
    content["markdown"] = _markdown(content, decision.verdicts)
    return content


def escape(text: str, limit: int | None = TEXT_LIMIT) -> str:
    """`text` on one line, inert in Markdown and HTML, cut after `limit` characters.

    Control and format characters (bidirectional overrides, zero width, lone surrogates) become visible `U+XXXX`.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text)} characters)"
    return "".join(_inert(char) for char in re.sub(r"[ \t\r\n\f\v]+", " ", text))


def _inert(char: str) -> str:
    if char in _HTML:
        return _HTML[char]
    if char in _SPECIAL:
        return f"\\{char}"
    return f"U+{ord(char):04X}" if unicodedata.category(char) in _INVISIBLE else char


def table(verdicts: Sequence[GateVerdict]) -> str:
    """The verdicts as a Markdown table, worst first."""
    order = {"regressed": 0, "inconclusive": 1, "non_inferior": 2}
    lines = [
        "| gate | slice | level | verdict | items | baseline | candidate | difference | margin | detectable | p |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for verdict in sorted(verdicts, key=lambda v: (order[v.verdict], v.difference)):
        where = "overall" if verdict.label == "overall" else f"{verdict.label} = {verdict.value}"
        lines.append(
            f"| {escape(verdict.gate)} | {escape(where)} | {verdict.level} | {escape(verdict.verdict)} | {verdict.items} | "
            f"{verdict.baseline:.3f} | {verdict.candidate:.3f} | {verdict.difference:+.3f} "
            f"({verdict.low:+.3f} to {verdict.high:+.3f}) | {verdict.margin:.3f} | {verdict.detectable:.3f} | {verdict.p_value:.2g} |"
        )
    return "\n".join(lines)


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    def side(name: str) -> dict[str, Any]:
        return {"answer": escape(str(row[name].get("answer", ""))), "score": int(row[name]["score"])}

    return {
        "suite": escape(row["suite"]),
        "task": escape(row["task"]),
        "item": escape(row["item"]),
        "slices": {escape(label): escape(str(value)) for label, value in sorted(row["slices"].items())},
        "target": escape(str(row.get("target", ""))),
        "candidate": side("candidate"),
        "baseline": side("baseline"),
    }


def _markdown(content: Mapping[str, Any], verdicts: Sequence[GateVerdict]) -> str:
    lines = [f"## Decision: {escape(content['decision'])}", "", *(f"- {reason}" for reason in content["reasons"]), "", table(verdicts), ""]
    lines += [
        f"{content['flipped_total']} items flipped, {content['lost_total']} of them lost; the worst {min(20, len(content['flipped']))}:",
        "",
    ]
    lines += ["| item | slices | target | baseline | candidate |", "|---|---|---|---|---|"]
    for row in content["flipped"][:20]:
        slices = ", ".join(f"{label} {value}" for label, value in row["slices"].items())
        name = f"{row['suite']}/{row['task']}/{row['item']}"
        lines.append(f"| {name} | {slices} | {row['target']} | {row['baseline']['answer']} | {row['candidate']['answer']} |")
    lines += ["", *(f"- {escape(name)}: `{digest}`" for name, digest in content["digests"].items() if re.fullmatch(r"[0-9a-f]+", digest))]
    return "\n".join([*lines, "", f"    {content['command']}", ""])
