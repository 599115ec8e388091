"""Writes the tables of docs/settings.md from kvcat_nemo's: python -m benchmarks.settings_page"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def tables() -> dict[str, str]:
    """Name of a block of the page → its text."""
    from kvcat_nemo.engine import megatron_settings as model
    from kvcat_nemo.nemo import trainer_settings as run

    refused = ["| field | accepted | why, and what to do |", "|---|---|---|"]
    for where, table in (
        ("model.config", model.MODEL),
        ("trainer.strategy", run.STRATEGY),
        ("trainer.strategy.ddp", run.DDP),
        ("trainer.plugins", run.PRECISION),
        ("optim.config", run.OPTIMIZER),
    ):
        for name, rule in table.items():
            accepted = ", ".join(f"`{value!r}`" for value in rule.but)
            refused.append(f"| `{where}.{name}` | {accepted} | {rule.why} |")
    out = {"refused": "\n".join(refused)}
    for block, parts in (("tested", (model.CONDITIONAL, run.TESTED)), ("passes", (model.PASSES, run.PASSES))):
        lines = ["| field | |", "|---|---|"]
        for where, table in zip(("model.config", "trainer"), parts, strict=True):
            lines += [f"| {where}: `{name}` | {text} |" for name, text in table.items()]
        out[block] = "\n".join(lines)
    return out


def render(page: str) -> str:
    """The page with the text of its blocks written again."""
    for name, text in tables().items():
        pattern = rf"(<!-- settings: {name} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
