"""Draw a short text twice, its tokens shaded by their weights under two specs.

A model first, on Python's standard library, 4,096 tokens a step; the picture is of step 400 of 600:

    weighting train uniform --config llama3_proxy --training.steps 600 \
        --training.seq_len 256 --checkpoint.enable --checkpoint.interval 200
    python benchmarks/tokens.py specs/tokens.svg --checkpoint outputs/uniform/checkpoint/step-400 \
        --config llama3_proxy --text benchmarks/tokens.txt --training.seq_len 256
"""

import argparse
import re
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

from titan_integration.commands.tokens import Options, shaded_text
from weighting.language.read import resolve
from weighting.report.shading import Shaded, Token, reach, shade
from weighting.spec import arrow_text

WIDTH, MARGIN, TOP, LINE = 860, 20, 140, 20
HALF = (WIDTH - 3 * MARGIN) / 2
EM = 0.6
"""Width of a monospaced character in font sizes; texts are stretched to it, whatever the font."""
LEVELS = range(-5, 6)
STYLE = """
text { font-family: sans-serif; font-size: 13px; fill: #1b1b1b }
.code { font-family: monospace; pointer-events: none }
.soft { fill: #555 } .page { fill: #fff } .frame { fill: none; stroke: #d5d5d0 }
.up { fill: #e69f00 } .down { fill: #56b4e9 } .even { fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e8e6 }
  .soft { fill: #b0b0ac } .page { fill: #16181a } .frame { stroke: #3c4044 }
  .up { fill: #9e5c00 } .down { fill: #00629e }
}
"""


def main() -> None:
    """Write the picture to the file named on the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="Further flags are torchtitan's.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--module", default="titan_integration")
    parser.add_argument("--config", default="llama3_debugmodel")
    parser.add_argument("--specs", nargs=2, default=["mile", "focal"])
    args, flags = parser.parse_known_args()
    options = Options(
        specs=[(text, resolve(text)) for text in args.specs],
        checkpoint=args.checkpoint,
        text=str(args.text),
        module=args.module,
        config=args.config,
        flags=flags,
    )
    args.out.write_text(picture(shaded_text(options)), encoding="utf-8")


def picture(shaded: Shaded) -> str:
    """Return a text under two specs side by side, as SVG whose words are text."""
    r = reach(shaded)
    rows = [*placed(shaded.tokens)]
    count = 1 + max(line for line, _, _, _ in rows)
    columns = max(column + len(text) for _, column, text, _ in rows)
    size = min(13.0, HALF / columns / EM)
    notes = textwrap.wrap(f"{'; '.join(shaded.facts)}.", 110)
    height = TOP + count * LINE + 20 + 18 * len(notes)
    names = " and ".join(spec.name for spec in shaded.specs)
    title = f"What each token of a text weighs under {names}"
    parts = [
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f"<rect class='page' width='{WIDTH}' height='{height}' rx='6'/>",
        words(title, MARGIN, 30, size=17),
        *legend(r),
    ]
    for index in range(len(shaded.specs)):
        parts += panel(shaded, rows, index, r, count, size)
    for line, note in enumerate(notes):
        parts.append(words(note, MARGIN, TOP + count * LINE + 28 + 18 * line, "soft", 12))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"viewBox='0 0 {WIDTH} {height}' role='img'>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def placed(tokens: tuple[Token, ...]) -> Iterator[tuple[int, int, str, Token]]:
    """Yield line, column and text of every piece of a token; a line's end is shown as an arrow."""
    line = column = 0
    for token in tokens:
        text = token.text or (token.mark if token.weights else "")
        for piece in re.findall(r"[^\n]*\n|[^\n]+", text.expandtabs(4)):
            ends = piece.endswith("\n")
            # XML has no control characters.
            shown = "".join(c if c.isprintable() else "\ufffd" for c in piece.removesuffix("\n"))
            yield line, column, shown + "↵" * ends, token
            line, column = (line + 1, 0) if ends else (line, column + len(shown))


def panel(
    shaded: Shaded,
    rows: list[tuple[int, int, str, Token]],
    index: int,
    r: float,
    count: int,
    size: float,
) -> Iterator[str]:
    """Yield what one spec makes of the text: a heading, shades, and the text over them."""
    left, width = MARGIN + index * (HALF + MARGIN), size * EM
    name = shaded.specs[index].name
    pipelines = " × ".join(map(arrow_text, resolve(name).factors.values()))
    weights = [token.weights[index] for token in shaded.tokens if token.weights]
    span = f"{min(weights):.2f} to {max(weights):.2f}"
    yield words(f"{name}: {pipelines}", left, TOP - 32)
    yield words(f"weights from {span}", left, TOP - 14, "soft", 12)
    yield (
        f"<rect class='frame' x='{left - 5:g}' y='{TOP - 5}' width='{HALF + 10:g}' "
        f"height='{count * LINE + 10}' rx='4'/>"
    )
    for line, column, text, token in rows:
        if token.weights:
            place = f"x='{left + column * width:.2f}' y='{TOP + line * LINE + 1}'"
            box = f"width='{len(text) * width:.2f}' height='{LINE - 2}'"
            told = f"loss {token.loss:.2f} nats, entropy {token.entropy:.2f} nats, "
            told += f"weight {token.weights[index]:.2f}"
            look = filled(shade(token.weights[index], r))
            yield f"<rect {look} {place} {box}><title>{told}</title></rect>"
    for number in range(count):
        text = "".join(text for line, _, text, _ in rows if line == number)
        if text:
            y = TOP + number * LINE + 14.5
            yield (
                f"<text class='code' xml:space='preserve' x='{left:g}' y='{y:g}' "
                f"style='font-size:{size:.2f}px' textLength='{len(text) * width:.2f}' "
                f"lengthAdjust='spacingAndGlyphs'>{escape(text, quote=False)}</text>"
            )


def legend(r: float) -> Iterator[str]:
    """Yield a swatch for each shade, with the weight in its middle."""
    yield words("weight (mean one)", MARGIN, 67)
    for place, level in enumerate(LEVELS):
        x = 145 + place * 52
        sign = {LEVELS[0]: "≤ ", LEVELS[-1]: "≥ "}.get(level, "")
        yield f"<rect {filled(level)} x='{x}' y='52' width='52' height='22'/>"
        yield words(f"{sign}{r ** (level / LEVELS[-1]):.2f}", x + 26, 67, anchor="middle")
    yield f"<rect class='frame' x='145' y='52' width='{52 * len(LEVELS)}' height='22'/>"


def filled(level: int) -> str:
    """Return the look of a shade."""
    kind = "up" if level > 0 else "down" if level < 0 else "even"
    return f"class='{kind}' fill-opacity='{abs(level) / LEVELS[-1]:g}'"


def words(
    text: str, x: float, y: float, kind: str = "", size: int = 13, anchor: str = "start"
) -> str:
    """Return a line of plain text."""
    look = f"class='{kind}' style='font-size:{size}px' text-anchor='{anchor}'"
    return f"<text {look} x='{x:g}' y='{y:g}'>{escape(text, quote=False)}</text>"


if __name__ == "__main__":
    main()
