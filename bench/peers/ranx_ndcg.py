"""Reads answers and runs as JSON on standard input, writes each run's nDCG. It runs where ranx is installed."""

from __future__ import annotations

import json
import sys

from ranx import Qrels, Run, evaluate

asked = json.load(sys.stdin)
answers = Qrels({str(query): documents for query, documents in enumerate(asked["answers"])})
found = {
    name: float(evaluate(answers, Run({str(query): row for query, row in enumerate(run)}), f"ndcg@{asked['depth']}"))
    for name, run in asked["runs"].items()
}
print(json.dumps(found))
