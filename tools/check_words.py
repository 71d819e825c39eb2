"""`python tools/check_words.py`: refuse words and names that the field does not use.

Each entry is a whole-word pattern and what to write instead. Ordinary words (table, found, behind) are not listed.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Pattern -> what to write.
WORDS = {
    r"(?<!head)(?<!make )(?<!no )(?<!there is )(?<!leaves )\brooms?\b(?! (for|to|beside|again))": "stage",
    r"\b[\w]*_rooms?\b|\brooms?_[\w]*\b|\bROOMS?\b": "stage",
    r"\bthe door (to|for)\b|\bdoors\b": "client, adapter or entry point",
    r"\bon the floor\b": "in shared code",
    r"\bmend(s|ed|ing)?\b": "fix, correct",
    r"\banew\b": "again",
    r"\bwish(es)?\b|\bWish\b": "request",
    r"\bmanners?\b|\bManner\b": "settings",
    r"\bbeats? no heart\b|\bno beat\b": "sends no heartbeat",
    r"\bgo(es)? on from\b|\bgoing on from\b|\bwent on from\b|\bgoes on there\b": "resume, continue from",
    r"\bh[eo]ld(s|ing)? (it |them |[a-z]+ )?against\b|\bheld (against|to the|to a)\b": "compare with, check against",
    r"\bstranger('?s)?\b": "next sequence's token",
    r"\bbelieved unseen\b|\bINTENT_BELIEVED\b": "is not verified on pull",
    r"\blooked at the world\b|\bthe world outside\b": "checked for changes",
    r"\b(came|comes) of it\b|\bwhat came of\b": "result",
    r"\b(leave|leaves|left) (the|their|its|no) (files?|table)\b": "write, produce",
    r"\bnats an? (byte|token)\b": "nats/byte, nats/token",
    r"\blikewise\b": "also, the same",
    r"\bfor ever\b": "permanently, indefinitely",
    r"\bwhoever\b": "the user, the reader, the caller",
    r"\bturned out the same\b": "is unchanged",
    r"\b(bring_up|patiently|outlast_outage|Workforce|lay_out)\b": "a name that says what it returns or does",
    r"\bmeet\(|\b_ear\b|\bfound_registry\b|\bvouch\w*\b": "a name that says what it returns or does",
}
# Where old words may stand: quoted output of earlier runs, released entries, and this list.
EXEMPT = (
    "docs/runs.md",
    "CHANGELOG.md",
    "tools/check_words.py",
    "tests/contract/parity/",
    "tests/contract/model-card.txt",
)
SUFFIXES = (".py", ".md", ".jinja", ".yaml", ".toml", ".json", ".html", "Makefile")


def find_words(root: Path) -> list[str]:
    """Return `file:line: word -> what to write` for every hit in files that git tracks."""
    named = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    words = [
        (re.compile(pattern, re.IGNORECASE if pattern.islower() else 0), better) for pattern, better in WORDS.items()
    ]
    hits = []
    for name in named:
        if name.startswith(EXEMPT) or not name.endswith(SUFFIXES):
            continue
        for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), start=1):
            hits += [
                f"{name}:{number}: '{hit[0]}': write {better}" for word, better in words for hit in word.finditer(line)
            ]
    return hits


if __name__ == "__main__":
    found = find_words(ROOT)
    print("\n".join(found))
    print(f"{len(found)} words that the field does not use")
    sys.exit(bool(found))
