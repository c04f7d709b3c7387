"""The README says what plots/results.json says, shows figures that exist, and names real flags."""

import json
import re
from pathlib import Path

import data
import evaluate
import train_dpo
import train_sft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_table_is_the_one_of_results_json():
    results = json.loads((ROOT / "plots" / "results.json").read_text())
    for name, table in evaluate.readme_tables(results).items():
        if f"<!-- {name} -->" not in README:
            continue
        assert f"<!-- {name} -->\n{table}\n<!-- end {name} -->" in README, (
            f"make writes the table {name!r} anew"
        )


def test_every_figure_and_file_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`([a-z_]+\.py)`", README
    ):
        assert (ROOT / path).is_file(), path


def test_every_command_parses():
    scripts = {
        "data.py": data,
        "train_sft.py": train_sft,
        "train_dpo.py": train_dpo,
        "evaluate.py": evaluate,
    }
    commands = re.findall(r"python (\w+\.py)([^`\n#]*)", README)
    assert len(commands) > 3
    for script, flags in commands:
        scripts[script].parse_args(flags.split())
