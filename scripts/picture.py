"""The main picture of a report's page, as an SVG of its own: light or dark as its reader's screen.

python scripts/picture.py PAGE.html PICTURE.svg
"""

import re
import sys
from pathlib import Path

page = Path(sys.argv[1]).read_text(encoding="utf-8")
style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
start = page.find('<svg class="chart"')
if style is None or start < 0:
    sys.exit(f"{sys.argv[1]}: no picture in it; is it a page by `sparsetune report`?")
depth = end = 0
for tag in re.finditer(r"<svg\b|</svg>", page[start:]):
    depth += 1 if tag.group() == "<svg" else -1
    if depth == 0:
        end = start + tag.end()
        break
own = "svg { background: var(--back); font-family: system-ui, sans-serif; } .chart text {"
own += " font-size: 7.5px; }"
head = '<svg xmlns="http://www.w3.org/2000/svg" class="chart"'
drawn = page[start:end].replace('<svg class="chart"', head, 1)
drawn = drawn.replace(">", f"><style>{style.group(1)}\n{own}</style>", 1)
Path(sys.argv[2]).write_text(drawn + "\n", encoding="utf-8")
