"""The validation report as one HTML page: no script, no network, no clock; the same bytes for the same report.

Plots are SVG in whole numbers. What is judged is said in `rules.py`, `conversations.py`, `validation.py`; every text here is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{--ink:#1a202c;--soft:#5a6577;--line:#e2e8f0;--back:#f7f8fa;--card:#fff;--now:#2b6cb0;--ref:#a0aec0;--pass:#2f855a;--warn:#b7791f;
--fail:#c53030;--none:#718096}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b5;--line:#2d3748;--back:#12161d;--card:#1b212b;--now:#63a4e8;
--ref:#5b6778;--pass:#48bb78;--warn:#ecc94b;--fail:#fc8181;--none:#90a0b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:40px 0 12px}h3{font-size:14px;margin:0 0 8px;font-weight:600}
p{margin:4px 0 12px}.soft{color:var(--soft)}code,.id{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.head{border-left:6px solid var(--tone)}.verdict{font-weight:700;color:var(--tone)}
.pass{--tone:var(--pass)}.warn{--tone:var(--warn)}.fail{--tone:var(--fail)}.none{--tone:var(--none)}
.chip{display:inline-block;min-width:46px;text-align:center;padding:1px 9px;border-radius:99px;border:1px solid var(--tone);color:var(--tone);
font-size:12px;font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin:16px 0}
.tile b{display:block;font-size:20px;white-space:nowrap;line-height:1.25;font-variant-numeric:tabular-nums}.card>.soft{font-size:12.5px}.tile span{color:var(--soft);font-size:13px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-size:12px;color:var(--soft);font-weight:600;padding:6px 10px;border-bottom:1px solid var(--line)}
td{padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.rule{font-weight:600;white-space:nowrap}
td.detail{overflow-wrap:anywhere}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:14px}
svg{display:block;max-width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.now{fill:var(--now)}.ref{fill:var(--ref)}.axis{stroke:var(--line)}.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 12px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""
GROUPS = {
    "records": ("Records", "One check a record, on every record. The effect is the number of records that fail."),
    "totals": ("Totals", "Sums over the leaves against what the documents say, and the recipe's limits."),
    "sample": ("Samples", "Checks on records drawn by a keyed hash of their id: the same data draws the same records."),
    "drift": (
        "Drift",
        "Against the last promoted snapshot, gated by effect size: population stability index (psi), Jensen-Shannon distance (js), and "
        "the area under the curve of a classifier that tells the two apart by their words (auc, 0.5 is guessing).",
    ),
    "expectations": ("Great Expectations", "The suite that the recipe names."),
}
VERDICTS = {"fail": "failed", "warn": "with warnings", "pass": "passed", "none": "nothing to compare with"}
#: distributions whose bins are numbers in order, and the unit of a bin
ORDERED = {
    "lengths": "tokens a record (powers of two, lower edge)",
    "characters": "characters a record (powers of two, lower edge)",
    "trained_percent": "trained tokens in percent (tenths, lower edge)",
    "turns": "turns a record",
}
BARS = 12  # bins of a plot; the rest is summed up in one


def page(report: Mapping[str, Any]) -> bytes:
    """The page of one report (as `report.json` holds it), UTF-8."""
    sections = [_head(report), _attention(report["rules"])]
    sections += [_rules(group, [rule for rule in report["rules"] if rule["group"] == group]) for group in GROUPS]
    sections += [_plots(report), _failing(report["failing"]), _differences(report["differences"]), _aside(report["facts"])]
    sections.append(_made_of(report["facts"]))
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Validation report: {escape(report['verdict'])}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    ).encode()


def _text(value: Any) -> str:
    """Escaped; numbers with thousands marked, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(str(value))
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}"
    return f"{int(value):,}".replace(",", "\u202f")


def _chip(verdict: str) -> str:
    return f'<span class="chip {escape(verdict)}">{escape(verdict)}</span>'


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """Columns as (title, class); cells are HTML."""
    head = "".join(f'<th class="{kind}">{escape(title)}</th>' for title, kind in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for (_title, kind), cell in zip(columns, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


# ---- head


def _head(report: Mapping[str, Any]) -> str:
    facts, rules = report["facts"], report["rules"]
    tally = {verdict: sum(rule["verdict"] == verdict for rule in rules) for verdict in VERDICTS}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in tally.items() if count)
    tokens, trained = sum(facts["tokens"].values()), sum(facts["trained"].values())
    equal, drawn = facts["rebuilt"]
    tiles = [
        ("records", _text(sum(facts["records"].values()))),
        ("of them for validation", _text(facts["records"].get("validation", 0))),
        ("tokens", _text(tokens)),
        ("trained tokens", f"{1000 * trained // tokens / 10 if tokens else 0:.1f} %"),
        ("rebuilt from raw, equal", f"{_text(equal)} of {_text(drawn)}"),
        ("raw rows set aside", _text(sum(facts["set_aside"].values()))),
    ]
    shown = "".join(f'<div class="card tile"><b>{value}</b><span>{escape(name)}</span></div>' for name, value in tiles)
    verdict = report["verdict"]
    said = VERDICTS.get(verdict, verdict)
    return (
        f'<header class="card head {escape(verdict)}"><h1>Validation <span class="verdict">{escape(said)}</span></h1>'
        f'<div class="soft">{len(rules)} rules: {escape(counted)}</div></header>\n<div class="tiles">{shown}</div>'
    )


def _attention(rules: Sequence[Mapping[str, Any]]) -> str:
    found = [rule for verdict in ("fail", "warn") for rule in rules if rule["verdict"] == verdict]
    if not found:
        return ""
    rows = ([_chip(rule["verdict"]), escape(rule["name"]), escape(rule["detail"])] for rule in found)
    return "<h2>What needs a look</h2>" + _table([("verdict", ""), ("rule", "rule"), ("why", "detail")], rows)


def _rules(group: str, rules: Sequence[Mapping[str, Any]]) -> str:
    if not rules:
        return ""
    title, told = GROUPS[group]
    rows = (
        [_chip(rule["verdict"]), escape(rule["name"]), _text(rule["effect"]), _text(rule["limit"]), escape(rule["detail"])]
        for rule in rules
    )
    columns = [("verdict", ""), ("rule", "rule"), ("effect", "n"), ("limit", "n"), ("what was seen", "detail")]
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(told)}</p>' + _table(columns, rows)


# ---- plots


def _plots(report: Mapping[str, Any]) -> str:
    now, before = report["distributions"]["now"], report["distributions"]["reference"]
    beside = {name: counts for name, counts in report["histograms"].items() if name not in now}
    drawn = [_plot(name, counts, (before or {}).get(name)) for name, counts in [*sorted(now.items()), *sorted(beside.items())] if counts]
    key = '<span class="key"><i style="background:var(--now)"></i>this snapshot'
    key += '<i style="background:var(--ref)"></i>last promoted snapshot</span>' if before else "</span>"
    return f'<h2>Distributions</h2><p class="soft">Shares of records (of tokens for trained_tokens).{key}</p><div class="plots">{"".join(drawn)}</div>'


def _plot(name: str, now: Mapping[str, int], before: Mapping[str, int] | None) -> str:
    told = ORDERED.get(name, "")
    bins = _bins(name, now, before or {})
    body = _columns(bins) if name in ORDERED else _bars(bins)
    return f'<div class="card"><h3>{escape(name)}</h3>{body}<div class="soft">{escape(told)}</div></div>'


Bin = tuple[str, int, int | None]  # name, share now, share before; both in thousandths


def _bins(name: str, now: Mapping[str, int], before: Mapping[str, int]) -> list[Bin]:
    names = now.keys() | before.keys()
    if name in ORDERED:
        ordered = sorted(names, key=int)
    else:
        ordered = sorted(names, key=lambda one: (-now.get(one, 0), -before.get(one, 0), one))
    shown, rest = ordered[:BARS], ordered[BARS:]
    total, total_before = max(1, sum(now.values())), max(1, sum(before.values()))

    def shares(title: str, which: Sequence[str]) -> Bin:
        here, there = (sum(counts.get(one, 0) for one in which) for counts in (now, before))
        return title, 1000 * here // total, 1000 * there // total_before if before else None

    bins = [shares(one, [one]) for one in shown]
    return [*bins, shares(f"{len(rest)} more", rest)] if rest else bins


def _columns(bins: Sequence[Bin]) -> str:
    """Upright bars, in the order of the bins."""
    wide, high, step = 340, 110, 340 // max(1, len(bins))
    top = max(1, max(max(here, there or 0) for _name, here, there in bins))
    parts = [f'<line class="axis" x1="0" y1="{high}" x2="{wide}" y2="{high}"/>']
    for index, (name, here, there) in enumerate(bins):
        room = min(64, max(2, step - 6))
        x = index * step + (step - room) // 2
        each = room // 2 if there is not None else room
        for kind, share, at in (("now", here, x), ("ref", there, x + each)):
            if share is not None:
                tall = max(1 if share else 0, share * (high - 16) // top)
                label = f"{share // 10}.{share % 10} %"
                parts.append(
                    f'<rect class="{kind}" x="{at}" y="{high - tall}" width="{each}" height="{tall}"><title>{label}</title></rect>'
                )
        parts.append(f'<text x="{x + room // 2}" y="{high + 14}" text-anchor="middle">{escape(name)}</text>')
        if step >= 40 and here:
            parts.append(
                f'<text x="{x + each // 2}" y="{high - 4 - max(1 if here else 0, here * (high - 16) // top)}" text-anchor="middle">{_percent(here)}</text>'
            )
    return f'<svg viewBox="0 0 {wide} {high + 20}" width="{wide}" height="{high + 20}" role="img">{"".join(parts)}</svg>'


def _bars(bins: Sequence[Bin]) -> str:
    """Lying bars, the largest share first."""
    left, long_, row = 116, 180, 22
    top = max(1, max(max(here, there or 0) for _name, here, there in bins))
    parts = []
    for index, (name, here, there) in enumerate(bins):
        y = index * row
        thick = 7 if there is not None else 13
        cut = name if len(name) <= 18 else f"{name[:17]}…"
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end"><title>{escape(name)}</title>{escape(cut)}</text>')
        for kind, share, at in (("now", here, y + 3), ("ref", there, y + 10)):
            if share is not None:
                parts.append(
                    f'<rect class="{kind}" x="{left}" y="{at}" width="{max(1 if share else 0, share * long_ // top)}" height="{thick}"/>'
                )
        parts.append(f'<text x="{left + max(here, there or 0) * long_ // top + 6}" y="{y + 14}">{_percent(here)}</text>')
    high = row * len(bins)
    return f'<svg viewBox="0 0 340 {high}" width="340" height="{high}" role="img">{"".join(parts)}</svg>'


def _percent(share: int) -> str:
    return f"{share // 10} %" if share >= 100 else f"{share // 10}.{share % 10} %"


# ---- records


def _failing(failing: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not failing:
        return ""
    columns = [("record", "id"), ("split", ""), ("tokens", "n"), ("trained", "n"), ("labels", ""), ("shape of its text", "detail id")]
    blocks = []
    for rule, rows in failing.items():
        cells = (
            [
                escape(row["record"][:16]),
                _text(row.get("split")),
                _text(row.get("tokens")),
                _text(row.get("trained")),
                escape(", ".join(f"{name.removeprefix('slice ')} {value}" for name, value in sorted(row.get("labels", {}).items()))) or "–",
                escape(row.get("shape", "–")),
            ]
            for row in rows
        )
        blocks.append(f"<h3>{escape(rule)}</h3>" + _table(columns, cells) + "<p></p>")
    told = (
        "Up to twenty a rule, without what they say: letters are shown as x, digits as 9. "
        "<code>repro blame RECORD</code> leads to file and line."
    )
    return f'<h2>Records that fail</h2><p class="soft">{told}</p>' + "".join(blocks)


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    if not differences:
        return ""
    rows = ([escape(one["record"][:16]), escape(one["where"] or "raw"), escape(one["what"])] for one in differences)
    return "<h2>Records that raw does not give again</h2>" + _table(
        [("record", "id"), ("where", "detail"), ("what differs", "detail")], rows
    )


def _aside(facts: Mapping[str, Any]) -> str:
    if not facts["set_aside"]:
        return ""
    rows = ([escape(reason), _text(count)] for reason, count in facts["set_aside"].items())
    told = f"Of {_text(facts['rows_read'])} rows read. Each is in <code>quarantine.jsonl</code> of records, with file, line and reason."
    return f'<h2>Raw rows set aside</h2><p class="soft">{told}</p>' + _table([("reason", "rule"), ("rows", "n")], rows)


def _made_of(facts: Mapping[str, Any]) -> str:
    said = {
        "raw manifest": f"{facts['manifest']} ({facts['files']} files)",
        "token leaves": str(facts["leaves"]),
        "tokenizer": facts["tokenizer"],
        "chat template": facts["template"],
        "engine": facts["engine"],
        "base model": facts["architecture"],
    }
    rows = "".join(f'<dt>{escape(name)}</dt><dd class="id">{escape(value)}</dd>' for name, value in said.items())
    told = "This page is made from report.json beside it and holds no clock: the same data, recipe and code give the same bytes."
    return f'<h2>Made of</h2><div class="card"><dl>{rows}</dl></div><p class="soft">{told}</p>'
