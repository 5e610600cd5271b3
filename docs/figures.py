"""Makes the pictures in docs/images and the tables of docs/benchmarks.md from the text and figures beside them.

    python docs/figures.py             # write them anew
    python docs/figures.py --check     # write nothing; status 1 if one is not current
    python docs/figures.py --record    # run the demo first, and keep what the terminal showed in session.txt

architecture.svg is made of architecture.txt, session.svg of session.txt, peers.svg and the tables of
benchmarks/results/peers.json.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
PEERS = DOCS.parent / "benchmarks" / "results" / "peers.json"
BENCHMARKS = DOCS / "benchmarks.md"

SANS = "font-family='Helvetica, Arial, sans-serif'"
MONO = "font-family='ui-monospace, Menlo, Consolas, monospace'"
HALO = "stroke='#ffffff' stroke-width='3' paint-order='stroke'"  # keeps a label readable on a line
INK, GREY, PALE = "#1f2933", "#616e7c", "#e4e7eb"
COLOURS = ("#0b6e99", "#3aa6b9", "#e07b39", "#8c564b")
# Ratios of one kind: which measures the chart shows, and how it calls them.
SHOWN = {
    "c1": "1 stream",
    "c8": "8 streams",
    "c32": "32 streams",
    "offline": "64 at once",
    "prefill": "long prompts",
    "prefix": "shared prefix",
}
SESSION = (
    'octavo generate "What is the capital of France?" --temperature 0',
    'octavo generate "Write a haiku about the sea." --seed 7 --max-tokens 40',
    "octavo health --address 127.0.0.1:50051",
)
START_SECONDS = 300


def main(arguments: list[str]) -> None:
    """Write all files, or check them."""
    if "--record" in arguments:
        (IMAGES / "session.txt").write_text(record())
    peers = json.loads(PEERS.read_text())
    files = {
        IMAGES / "architecture.svg": architecture((IMAGES / "architecture.txt").read_text()),
        IMAGES / "session.svg": session((IMAGES / "session.txt").read_text()),
        IMAGES / "peers.svg": chart(peers),
        BENCHMARKS: with_tables(BENCHMARKS.read_text(), peers),
    }
    for path, text in files.items():
        if "--check" not in arguments:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise SystemExit(f"{path} is not current: python docs/figures.py writes it anew")


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG document on a white page, so that it can be read on a dark one too."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' role='img'>"
    page = f"<rect width='{width}' height='{height}' rx='8' fill='#ffffff'/>"
    return "\n".join((head, f"<title>{escape(title)}</title>", page, *parts, "</svg>")) + "\n"


def words(x: float, y: float, text: str, size: int = 13, style: str = "") -> str:
    """Return a line of text that begins at x, y."""
    font = "" if "font-family" in style else SANS
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' {font} {style}>{escape(text)}</text>"


def architecture(text: str) -> str:
    """Draw a stack of boxes (`name | what it does`) with an arrow between two (`> what | details`)."""
    parts: list[str] = []
    y = 16
    for line in text.strip().splitlines():
        name, what = (piece.strip() for piece in line.lstrip("> ").split("|"))
        if line.startswith(">"):
            parts.append(f"<path d='M60 {y} v34' stroke='{GREY}' stroke-width='1.5' fill='none'/>")
            parts.append(f"<path d='M56 {y + 30} l4 8 l4 -8 z M56 {y + 8} l4 -8 l4 8 z' fill='{GREY}'/>")
            parts.append(words(84, y + 16, name, 12, f"fill='{COLOURS[0]}' {MONO}"))
            parts.append(words(84, y + 32, what, 12, f"fill='{GREY}'"))
            y += 38
        else:
            colour = GREY if not parts else COLOURS[0]
            parts.append(f"<rect x='16' y='{y}' width='728' height='44' rx='6' fill='#f5f9fb' stroke='{colour}'/>")
            parts.append(words(32, y + 27, name, 14, f"font-weight='bold' fill='{INK}'"))
            parts.append(words(232, y + 27, what, 13, f"fill='{INK}'"))
            y += 44
    return drawing(760, y + 16, "Clients, gateways, schedulers and workers, and what they say to each other", parts)


def session(text: str) -> str:
    """Draw a terminal that shows `text`; lines that begin with `$ ` are commands."""
    lines = [
        part
        for line in text.rstrip("\n").splitlines()
        for part in textwrap.wrap(line, 106, drop_whitespace=False) or [""]
    ]
    height = 58 + 18 * len(lines)
    parts = [f"<rect x='6' y='6' width='868' height='{height - 12}' rx='8' fill='#16202a'/>"]
    for number, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f")):
        parts.append(f"<circle cx='{26 + 20 * number}' cy='24' r='6' fill='{colour}'/>")
    for row, line in enumerate(lines):
        colour = "#8fd3e8" if line.startswith("$ ") else "#e4e7eb"
        parts.append(words(24, 56 + 18 * row, line, 13, f"xml:space='preserve' fill='{colour}' {MONO}"))
    return drawing(880, height, "A terminal session: octavo serves the demo model and answers", parts)


def chart(peers: dict[str, Any]) -> str:
    """Draw how many times as fast as the best other server Octavo was: a bar for each measure and machine."""
    left, scale, top, bar = 130, 110, 72, 13
    machines = peers["machines"]
    group = bar * len(machines) + 14
    bottom = top + group * len(SHOWN)
    title = "Octavo against the best other server, on two CPU cores"
    parts = [words(16, 26, title, 16, f"font-weight='bold' fill='{INK}'")]
    for number, machine in enumerate(machines):
        x = 16 + 188 * number
        parts.append(f"<rect x='{x}' y='40' width='12' height='12' fill='{COLOURS[number]}'/>")
        parts.append(words(x + 18, 50, machine["name"], 11, f"fill='{INK}'"))
    for tick in range(6):
        x = left + scale * tick
        line = f"stroke='{INK}' stroke-width='1.5'" if tick == 1 else f"stroke='{PALE}'"
        parts.append(f"<path d='M{x} {top - 8} V{bottom}' {line}/>")
        parts.append(words(x, bottom + 16, f"{tick}×", 11, f"fill='{GREY}' text-anchor='middle'"))
    for place, (measure, name) in enumerate(SHOWN.items()):
        y = top + group * place
        parts.append(words(left - 10, y + group / 2 - 2, name, 12, f"fill='{INK}' text-anchor='end'"))
        for number, machine in enumerate(machines):
            row = next(row for row in machine["rows"] if row[0] == measure)
            width = scale * row[4]
            size = f"width='{width:.1f}' height='{bar - 2}'"
            parts.append(f"<rect x='{left}' y='{y + bar * number}' {size} fill='{COLOURS[number]}'/>")
            label = f"{row[4]:.2f} ({row[3]})"
            parts.append(words(left + width + 5, y + bar * number + 9, label, 9, f"fill='{GREY}' {HALO}"))
    about = f"{peers['model']}. Right of the line at 1×, Octavo is faster."
    parts.append(words(16, bottom + 38, about, 11, f"fill='{GREY}'"))
    return drawing(760, bottom + 52, "Octavo's speed as a multiple of the best other server's", parts)


def with_tables(text: str, peers: dict[str, Any]) -> str:
    """Return `text` with what is between its two marks made anew: one table for each machine."""
    tables = []
    for machine in peers["machines"]:
        rounds = f"{machine['rounds']} round{'s' if machine['rounds'] > 1 else ''}"
        about = f"{machine['cores']} cores that read {machine['read_gb_per_s']} GB/s together; {rounds}"
        about += f"; {machine['note']}." if machine["note"] else "."
        rows = [
            "| measure | Octavo | best other server | ratio | OpenVINO, no server | ratio |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for measure, own, other, which, ratio, openvino, openvino_ratio in machine["rows"]:
            last = f"{openvino:,g} | {openvino_ratio:.2f}" if openvino is not None else "- | -"
            rows.append(f"| {peers['measures'][measure]} | {own:,} | {other:,} ({which}) | **{ratio:.2f}** | {last} |")
        tables.append("\n".join((f"### {machine['name']}", "", about, "", *rows)))
    made = "\n\n".join(tables)
    begin, end = "<!-- made by docs/figures.py -->", "<!-- end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{made}\n\n{end}", text, flags=re.DOTALL)


def record() -> str:
    """Serve the demo model and run the commands of SESSION against it; return what a terminal would show."""
    octavo = [sys.executable, "-m", "octavo.services.cli"]
    lines = ["$ octavo serve demo"]
    serve = [*octavo, "serve", "demo"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                lines.append(line.rstrip())
                if "in a terminal" in line:
                    break
            for command in SESSION:
                words_of = [*octavo, *shlex.split(command)[1:]]
                done = subprocess.run(words_of, capture_output=True, text=True, check=True, timeout=START_SECONDS)
                lines += ["", f"$ {command}", *done.stdout.rstrip().splitlines()]
        finally:
            server.terminate()
            server.stdout.read()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
