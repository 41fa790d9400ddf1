"""Write the tables in the docs that are made of what the code declares.

python docs/make_tables.py
"""

from __future__ import annotations

from pathlib import Path

from sdsurgery.inspection.rules import RULES

VERIFY = Path(__file__).parent / "commands" / "verify.md"
_BEGIN, _END = "<!-- rules -->\n", "<!-- end of rules -->\n"


def rules() -> str:
    """The rules of verify: what each finding means, and how much it matters to whom."""
    lines = ["| finding | severity | means |", "|---|---|---|"]
    for rule in RULES.values():
        by_severity: dict[str, list[str]] = {}
        for profile, severity in rule.profiles.items():
            by_severity.setdefault(severity or "nothing", []).append(profile)
        others = "".join(f"; {severity} for {', '.join(names)}" for severity, names in by_severity.items())
        lines.append(f"| `{rule.id}` | {rule.severity}{others} | {rule.title}. {rule.help} |")
    return "\n".join(lines) + "\n"


def with_rules(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{rules()}\n{_END}{after}"


if __name__ == "__main__":
    VERIFY.write_text(with_rules(VERIFY.read_text("utf-8")), "utf-8")
