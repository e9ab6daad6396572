#!/usr/bin/env python3
"""A judged run, kind by kind: what each arm flags, declines and leaves as the draft, and what it costs.

    kinds.py RUN    RUN was judged: `ecso eval judge RUN --judge xstest`. A kind is a scenario; below them, attacks and harmless requests as
                    wholes, with the AUROC of each arm's score between the two.
"""
import json
import sys
from pathlib import Path


def auroc(harmful, harmless):
    """The share of pairs in the right order; a tie is half of one."""
    pairs = [(a > b) + 0.5 * (a == b) for a in harmful for b in harmless]
    return sum(pairs) / len(pairs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    if not (run / "verdicts-xstest.jsonl").exists():
        sys.exit(f"{run} is no judged run: ecso eval judge {run} --judge xstest")
    records = [record for record in lines(run / "journal.jsonl")[1:] if record.get("arms")]
    declined = {(row["id"], row["arm"]) for row in lines(run / "verdicts-xstest.jsonl") if row["verdict"] == "refusal"}
    kinds = {}
    for record in records:
        whole = "harmless" if record["task"] == {"kind": "harmless"} else "attacks"
        for kind in (record["scenario"], f"all {whole}"):
            kinds.setdefault(kind, []).append(record)
    print("kind, arm: items; flagged; declined; the draft byte for byte; time against an unguarded answer")
    for kind in sorted(kinds):
        arms = [arm["profile"] for arm in kinds[kind][0]["arms"]]
        for place, name in enumerate(arms):
            own = [(record, record["arms"][0], record["arms"][place]) for record in kinds[kind]]
            took = [sum(step["ms"] for _, *both in own for step in both[which]["steps"]) for which in (0, 1)]
            print(f"{kind}, {name}: {len(own)}; {sum(arm['verdict'] == 'unsafe' for *_, arm in own)}; "
                  f"{sum((record['id'], name) in declined for record, *_ in own)}; {sum(bare['answer'] == arm['answer'] for _, bare, arm in own)}; "
                  f"{took[1] / took[0]:.2f}")
    for place, name in enumerate(arms[1:], 1):
        scores = [[record["arms"][place]["score"] for record in kinds.get(kind, [])] for kind in ("all attacks", "all harmless")]
        if all(scores) and None not in scores[0] + scores[1]:
            print(f"AUROC of {name}, attacks against harmless: {auroc(*scores):.3f}")


main()
