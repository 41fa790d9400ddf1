"""Write the parts of the docs that are made of what the code declares.

python docs/make_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdsurgery.inspection.rules import RULES
from sdsurgery.recipes.schema import schema

VERIFY = Path(__file__).parent / "commands" / "verify.md"
SCHEMA = Path(__file__).parent / "schemas" / "verify.json"
RECIPE = Path(__file__).parent / "schemas" / "recipe.json"
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


def with_ids(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of verify's report with the ids of all rules."""
    schema["$defs"]["finding"]["properties"]["id"]["enum"] = list(RULES)
    schema["properties"]["models"]["items"]["properties"]["rules"]["items"]["enum"] = list(RULES)
    return schema


def recipe_schema() -> str:
    """The schema of recipes, which editors check them with."""
    return json.dumps(schema(references=True), indent=2) + "\n"


if __name__ == "__main__":
    RECIPE.write_text(recipe_schema(), "utf-8")
    SCHEMA.write_text(json.dumps(with_ids(json.loads(SCHEMA.read_text("utf-8"))), indent=2) + "\n", "utf-8")
    VERIFY.write_text(with_rules(VERIFY.read_text("utf-8")), "utf-8")
