"""A report as one HTML page, without scripts and without anything from the network."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from html import escape
from typing import Any

from llava_lite.evaluation.report import USAGE, interval_text, part_text, value_text

MOST_BARS = 60  # of one kind of group
COLORS = {"preprocess": "#94a3b8", "vision": "#0e7490", "prefill": "#65a30d", "decode": "#d97706"}
STAGES = ("image_patches", "image_tokens", "kept_image_tokens")
NESTED = ("suite", "files", "suite_settings")  # settings with a place of their own
STYLE = """
:root { --ink: #1c2430; --soft: #5d6b7e; --line: #e1e6ed; --fill: #eef1f5; --mark: #0e7490; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: #fff; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem; }
p { margin: .2rem 0; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr));
  gap: .75rem; margin-top: 1.4rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 650; }
.card.first { background: #ecfeff; border-color: #a5d8e2; }
.card span { display: block; font-size: .83rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .22rem .6rem .22rem 0; text-align: left; vertical-align: middle; }
th { color: var(--soft); font-weight: 500; font-size: .83rem; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.bar { width: 40%; padding-left: .8rem; }
td.name { width: 27%; }
dl { columns: 2; column-gap: 2.5rem; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1.2rem; break-inside: avoid;
  border-top: 1px solid var(--line); padding: .18rem 0; }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { columns: 1; } }
svg { display: block; width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: .5rem; font-size: .87rem; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem;
  margin-right: .4rem; }
.warn { background: #fff7ed; border: 1px solid #fdba74; border-radius: .5rem;
  padding: .6rem .9rem; margin-top: 1.2rem; }
@media print { body { padding: 0; } }
"""


def page(content: Mapping[str, Any]) -> str:
    """The page of a report (report.py)."""
    title = f"{content['suite']}: {content['settings'].get('model')}"
    sections = [
        heading(content),
        cards(content),
        warning(content),
        *(group_section(kind, groups) for kind, groups in content["groups"].items()),
        speed_section(content["measured"]),
        token_section(content["tokens"]),
        settings_section(content["settings"]),
        runs_section(content["runs"]),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def heading(content: Mapping[str, Any]) -> str:
    """The title, with the most important settings."""
    settings, samples = content["settings"], content["samples"]
    names = ("dtype", "reduction", "template")
    facts = [f"{name} {settings.get(name)}" for name in names]
    facts.append("padded to a square" if settings.get("pad") else "cropped to a square")
    facts.append("greedy" if not settings.get("temperature") else "sampled")
    asked = f"{samples['answered']:,} of {samples['asked']:,} samples answered"
    return (
        f"<h1>{escape(str(content['suite']))}</h1>"
        f"<p><strong>{escape(str(settings.get('model')))}</strong> · {escape(asked)}</p>"
        f'<p class="soft">{escape(" · ".join(map(str, facts)))}</p>'
    )


def cards(content: Mapping[str, Any]) -> str:
    """The metrics, the main one first, and the speed."""
    shown = [
        card(name, value_text(metric), interval_text(metric), first=not position)
        for position, (name, metric) in enumerate(content["scores"].items())
    ]
    measured = content["measured"]
    if measured["questions_per_second"] is not None:
        rate = f"{measured['questions_per_second']:.2f}"
        shown.append(
            card("questions a second", rate, f"{measured['images_per_second']:.2f} images")
        )
    if measured["peak_memory_bytes"]:
        shown.append(card("peak memory", f"{measured['peak_memory_bytes'] / 1e9:.2f} GB", ""))
    return f'<div class="cards">{"".join(shown)}</div>'


def card(name: str, value: str, note: str, first: bool = False) -> str:
    kind = "card first" if first else "card"
    return (
        f'<div class="{kind}"><span>{escape(spell(name))}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(note) or "&nbsp;"}</span></div>'
    )


def warning(content: Mapping[str, Any]) -> str:
    """Samples that were not asked or have no answer, and answers that hit the limit of tokens."""
    samples = content["samples"]
    lines = [
        f"{failure['count']:,} × {failure['reason']} ({', '.join(failure['ids'])}"
        f"{', …' if failure['count'] > len(failure['ids']) else ''})"
        for failure in content["failures"]
    ]
    if lines:
        lines.insert(0, f"No answer for {samples['failed']:,}:")
    if samples["asked"] < samples["total"]:
        lines.insert(0, f"Warning: {part_text(samples)}.")
    if samples["cut_off"]:
        lines.append(f"Cut off at the limit of new tokens: {samples['cut_off']:,} of the answers.")
    if not lines:
        return ""
    return f'<div class="warn">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'


# ---- groups --------------------------------------------------------------------------------------


def group_section(kind: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar for each group, with its interval."""
    known = {name: metric for name, metric in groups.items() if metric["value"] is not None}
    if not known:
        return ""
    full = max(1.0, *(metric["value"] for metric in known.values()))
    shown = list(known.items())[:MOST_BARS]
    rows = "".join(
        f'<tr><td class="name">{escape(spell(name))}</td>'
        f'<td class="bar">{bar(metric, full)}</td>'
        f'<td class="number">{value_text(metric)}</td>'
        f'<td class="number soft">{escape(interval_text(metric))}</td>'
        f'<td class="number soft">{metric["count"]:,}</td></tr>'
        for name, metric in shown
    )
    more = len(known) - len(shown)
    rest = f'<p class="soft">and {more} more in the JSON report</p>' if more else ""
    head = '<tr><th></th><th></th><th></th><th class="number">95 % interval</th>'
    return (
        f'<h2>{escape(spell(kind))}</h2><table>{head}<th class="number">of</th></tr>{rows}</table>'
        + rest
    )


def bar(metric: Mapping[str, Any], full: float) -> str:
    """A bar from 0 to `full`, and its interval as a line over it."""
    parts = [
        '<rect x="0" y="3" width="100" height="8" rx="1" fill="#eef1f5"/>',
        f'<rect x="0" y="3" width="{100 * metric["value"] / full:.2f}" height="8" rx="1" '
        'fill="#67b3c4"/>',
    ]
    if metric["interval"] is not None:
        low, high = (100 * end / full for end in metric["interval"])
        parts.append(
            f'<line x1="{low:.2f}" x2="{high:.2f}" y1="7" y2="7" stroke="#134e5e" '
            'stroke-width="2" vector-effect="non-scaling-stroke"/>'
        )
    return svg(parts, 14)


def svg(parts: Iterable[str], height: int) -> str:
    """SVG parts, 100 units wide, stretched to the available width."""
    return (
        f'<svg viewBox="0 0 100 {height}" height="{height}" preserveAspectRatio="none" '
        f'role="img">{"".join(parts)}</svg>'
    )


# ---- costs ---------------------------------------------------------------------------------------


def speed_section(measured: Mapping[str, Any]) -> str:
    """Seconds per image and phase, as parts of one bar."""
    seconds = {name: time for name, time in measured["seconds_per_image"].items() if time}
    if not seconds:
        return ""
    total, start, parts, legend = sum(seconds.values()), 0.0, [], []
    for name, time in seconds.items():
        width = 100 * time / total
        parts.append(
            f'<rect x="{start:.2f}" y="0" width="{width:.2f}" height="22" fill="{COLORS[name]}"/>'
        )
        legend.append(f"<span>{swatch(COLORS[name])}{name} {seconds_text(time)}</span>")
        start += width
    wall = str(timedelta(seconds=round(measured["wall_seconds"])))
    return (
        f"<h2>Seconds of an image</h2>{svg(parts, 22)}"
        f'<div class="legend">{"".join(legend)}</div>'
        f'<p class="soft">{measured["images"]:,} images in {wall} of all runs together; images are '
        "opened while the model runs.</p>"
    )


def token_section(tokens: Mapping[str, float]) -> str:
    """Tokens of an average question per stage, as bars on one scale."""
    if not tokens:
        return ""
    full = max(1.0, *tokens.values())
    rows = []
    for name, words in USAGE.items():
        color = COLORS["vision" if name in STAGES else "preprocess"]
        drawn = f'<rect y="3" width="{100 * tokens[name] / full:.2f}" height="8" fill="{color}"/>'
        rows.append(
            f'<tr><td class="name">{words}</td><td class="bar">{svg([drawn], 14)}</td>'
            f'<td class="number">{tokens[name]:,.1f}</td></tr>'
        )
    return f"<h2>Tokens of a question, on average</h2><table>{''.join(rows)}</table>"


def settings_section(settings: Mapping[str, Any]) -> str:
    """All settings that change a score."""
    rows = [(name, value) for name, value in settings.items() if name not in NESTED]
    rows += [(f"file {entry['name']}", entry["sha256"]) for entry in settings.get("files", [])]
    rows += list(settings.get("suite_settings", {}).items())
    return f"<h2>Settings</h2><dl>{''.join(setting_row(*row) for row in rows)}</dl>"


def setting_row(name: str, value: object) -> str:
    words = "yes" if value is True else "no" if value is False else str(value)
    if value is None or value == []:
        words = "-"
    return f"<div><dt>{escape(spell(name))}</dt><dd>{escape(words)}</dd></div>"


def runs_section(runs: Iterable[Mapping[str, Any]]) -> str:
    """One line per run with answers."""
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in run_cells(run))}</tr>"
        for run in runs
        if run.get("samples")
    )
    if not rows:
        return ""
    names = ("started", "samples", "seconds", "machine", "software")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Runs</h2><table><tr>{head}</tr>{rows}</table>"


def run_cells(run: Mapping[str, Any]) -> Iterator[str]:
    yield str(run.get("started", ""))
    yield f"{run['samples']:,}"
    yield f"{run.get('seconds', 0.0):,.1f}"
    actors = f", {run['actors']} actors" if run.get("actors") else ""
    yield f"{run.get('device')}, {run.get('name')}, {run.get('threads')} threads{actors}"
    yield f"Python {run.get('python')}, torch {run.get('torch')}"


# ---- words ---------------------------------------------------------------------------------------


def seconds_text(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.1f} ms"


def swatch(color: str) -> str:
    return f'<i style="background:{color}"></i>'


def spell(name: str) -> str:
    """A name as words."""
    return str(name).replace("_", " ")
