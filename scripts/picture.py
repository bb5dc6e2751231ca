"""The main picture of a comparison, as an SVG of its own: light or dark as its reader's screen.

python scripts/picture.py NAME PICTURE.svg
"""

import sys
from pathlib import Path

from sparsetune.comparison.compare import compare
from sparsetune.reports.figures import Results
from sparsetune.reports.svg import style

name, file = sys.argv[1:]
pictures = Results(compare(name)).main().pictures
if not pictures:
    sys.exit(f"{name}: nothing of it is confirmed; do so by: sparsetune confirm {name}")
own = "svg { background: var(--back); font-family: system-ui, sans-serif; } .chart text {"
own += " font-size: 7.5px; }"
start, _, rest = pictures[0].partition(">")
start = start.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
Path(file).write_text(f"{start}><style>{style()}\n{own}</style>{rest}", encoding="utf-8")
