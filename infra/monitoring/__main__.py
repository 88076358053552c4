"""`python -m infra.monitoring` writes what is made from tables: the dashboard, and the indicators into README.md.

`--check` writes nothing and says what is not as it would be written (exit code 1).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.monitoring import dashboard, slis

HERE = Path(__file__).parent
DASHBOARD = HERE / "grafana" / "dashboards" / "concord.json"
README = HERE / "README.md"
BEGIN, END = "<!-- indicators: python -m infra.monitoring -->\n", "<!-- end of indicators -->\n"


def made() -> Mapping[Path, str]:
    """The content of each file that is made here."""
    readme = README.read_text(encoding="utf-8")
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{README} has no place for the indicators: {BEGIN.strip()} … {END.strip()}")
    return {DASHBOARD: dashboard.to_json(), README: f"{head}{BEGIN}{slis.markdown()}{END}{tail}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.monitoring", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    check = parser.parse_args().check
    stale = [path for path, text in made().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path} is not as python -m infra.monitoring writes it", file=sys.stderr)
        else:
            path.write_text(made()[path], encoding="utf-8")
            print(f"wrote {path}")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
