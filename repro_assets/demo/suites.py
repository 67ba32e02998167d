"""The demo's evaluation suites as folders of lm-eval task YAML and JSONL items, and the program that writes the shipped ones again:
`python -m repro_assets.demo.suites repro_assets/demo`. Which items there are is in `tickets.py`; how models are scored on them is not here.

`suite/` has the tasks `traffic` (what the desk sees; gates the whole) and `intents` (every intent alike; gates each one); `unit_suite/`
has a few ranked items. lm-eval reads `data_files` relative to the working directory, so a folder that may lie anywhere must be loaded
with the names made absolute (or the rows handed over), see `HEADER`; nothing in the folders is code.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from repro_assets.demo.tickets import suites

PROMPT = "<|user|>{{prompt}}<|end|><|assistant|>"
HEADER = """\
# Written by repro_assets/demo/suites.py. The names under data_files are relative to this file's folder, which the program that loads the
# task has to say: override dataset_kwargs with absolute names, or start lm-eval in this folder (lm_eval --tasks ... --include_path .).
"""


def _data(name: str) -> str:
    return f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
doc_to_text: "{PROMPT}"
target_delimiter: ""
"""


def _generation(task: str) -> str:
    """Greedy answers of at most 16 tokens, right when they equal the target exactly."""
    return f"""{HEADER}task: {task}
output_type: generate_until
{_data(task)}doc_to_target: target
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def _choice(task: str) -> str:
    """The likeliest of the answers that differ in the desk alone."""
    return f"""{HEADER}task: {task}
output_type: multiple_choice
{_data(task)}doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def _items(items: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def files() -> dict[str, bytes]:
    """The content of every file by its path under the suites' folder."""
    made = suites()
    return {
        path: text.encode()
        for path, text in {
            "suite/traffic.yaml": _generation("traffic"),
            "suite/traffic.jsonl": _items(made.traffic),
            "suite/intents.yaml": _generation("intents"),
            "suite/intents.jsonl": _items(made.intents),
            "unit_suite/unit.yaml": _choice("unit"),
            "unit_suite/unit.jsonl": _items(made.unit),
        }.items()
    }


def write(folder: Path) -> list[Path]:
    """Write both suites as `suite` and `unit_suite` under `folder`; returns the files' paths, sorted."""
    paths = []
    for name, data in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    return sorted(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's evaluation suites.")
    parser.add_argument("folder", type=Path)
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
