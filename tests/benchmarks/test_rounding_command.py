"""The rounding of a toy model, packed twice and one by one in transformers."""

import json

from benchmarks import rounding


def test_float32_differs_by_little(tmp_path, capsys):
    path = tmp_path / "rounding.json"
    assert rounding.main(["--toy", "--pairs", "3", "--json", str(path)]) == 0
    assert "largest / sqrt(n) and mean" in capsys.readouterr().out.splitlines()[-1]
    report = json.loads(path.read_text())
    assert len(report["lengths"]) == 3
    largest = max(max(map(abs, row)) for row in report["one by one"]["differences"])
    assert 0 < largest < 1e-3 and report["one by one"]["within"]
