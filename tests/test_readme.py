"""The README says what published.json says, shows figures that exist, and names real flags."""

import json
import re
import subprocess
import sys
from pathlib import Path

import data
import evaluate
import train_dpo
import train_sft
from plots import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "data.py": data,
    "train_sft.py": train_sft,
    "train_dpo.py": train_dpo,
    "evaluate.py": evaluate,
}


def test_every_table_and_number_is_the_one_of_published_json():
    published = json.loads(tables.PUBLISHED.read_text())
    assert tables.fill(README, published) == README, "make publish writes them anew"


def test_tables_are_made_of_json_alone():
    without = "import sys; sys.modules['torch'] = None; from plots import tables; "
    command = [sys.executable, "-c", without + "print(tables.published_models())"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in README


def test_no_measured_number_stands_outside_of_a_marker():
    """Decimal fractions in prose are settings (β, shares of flags) or come from published.json."""
    text = re.sub(r"<!-- .*?<!-- end -->", "", README, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`|\d{4}\.\d{4,5}", "", text, flags=re.DOTALL)
    settings = {"0.8", "9.17", "3.11"}
    assert set(re.findall(r"\d+\.\d+", text)) <= settings


def test_make_and_the_readme_train_what_is_published():
    """Each with the learning rate that the lesson found best for it: online's is the default."""
    makefile = (ROOT / "Makefile").read_text()
    methods = json.loads(tables.PUBLISHED.read_text())["methods"]
    flags = {model: methods[method]["flags"] for model, method in tables.MODELS.items()}
    default = flags.pop("dpo").split()
    assert vars(train_dpo.parse_args(default)) == vars(train_dpo.parse_args([]))
    for model in flags:
        assert f"FLAGS_{model} := {flags[model]}\n" in makefile
        assert f"python train_dpo.py {flags[model]} --out runs/{model}.pt\n" in README


def test_every_figure_and_file_exists():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    for path in linked + re.findall(r"`([a-z_]+\.py)`", README):
        assert (ROOT / path).is_file(), path


def test_every_command_parses():
    commands = re.findall(r"python (\w+\.py)([^`\n#>|]*)", README)
    assert len(commands) > 8
    for script, flags in commands:
        SCRIPTS[script].parse_args(flags.split())
