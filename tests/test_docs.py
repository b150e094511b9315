"""The documents say what the code says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_configuration_page_is_generated():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == generate.configuration(), "run python docs/generate.py"
