"""What the HTML pages share: one file each that holds everything itself and loads nothing.

Texts that come from users (captions, file names, prompts) are escaped by whoever writes them.
"""

import html
from collections.abc import Iterable, Sequence

from ursa.inspection.stats import FunnelRow
from ursa.texts import printable

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2430; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 10px; }
.small { color: #5a6472; font-size: 13px; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.facts div { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: 10px 16px; }
.facts b { display: block; font-size: 20px; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e1e5ea; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #eef0f3; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: #fafbfc; }
.motion { width: 100%; } .motion td:nth-child(2) { white-space: nowrap; }
.motion img { display: block; height: 64px; margin-left: auto; }
.funnel { width: 100%; } .funnel td:nth-child(3) { width: 52%; }
.bar { background: #eef0f3; height: 12px; border-radius: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: #2a7f62; }
.bar.lost i { background: #c27b4c; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
figure { margin: 0; background: #fff; border: 1px solid #e1e5ea; border-radius: 8px;
  overflow: hidden; }
figure img { display: block; width: 100%; }
figure .none { background: #11151b; color: #fff; text-align: center; line-height: 50px; }
figcaption { padding: 8px 12px; overflow-wrap: anywhere; }
.tag { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: 12px; color: #fff;
  background: #2a7f62; } .tag.lost { background: #a85b2a; }
img.wide { width: 100%; background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; }
video { display: block; width: 100%; background: #11151b; image-rendering: auto; }
.lineage { width: 100%; } .lineage td { text-align: left; }
h3 { font-size: 15px; margin: 16px 0 8px; }
a { color: #1f5f9e; }
"""
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document.

    Args:
        title: Any text.
        parts: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def escape(text: object) -> str:
    """Return a text that is a text in HTML, in attributes too.

    Args:
        text: Anything; what is not to be seen or turns the direction of a text is written out.
    """
    return html.escape(printable(text), quote=True)


def section(title: str, body: str) -> str:
    """Return a part with a heading.

    Args:
        title: HTML.
        body: HTML.
    """
    return f"<h2>{title}</h2>{body}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "") -> str:
    """Return a table of cells that are HTML already.

    Args:
        head: Names of the columns; none, no head.
        rows: Cells.
        kind: Class of the table.
    """
    first = f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}">{first}{body}</table>'


def funnel_table(funnel: Iterable[FunnelRow]) -> str:
    """Return a table with bars: how many files and clips came to which step.

    Args:
        funnel: The steps.
    """
    rows = []
    for row in funnel:
        share = row.count / row.total if row.total else 0.0
        is_loss = row.step.startswith(("quarantined", "rejected", "shots"))
        bar = (
            f'<div class="bar{" lost" if is_loss else ""}"><i style="width:{share:.2%}"></i></div>'
        )
        rows.append((escape(row.step), f"{row.count:,}", bar, f"{share:.1%}"))
    return table((), rows, kind="funnel")
