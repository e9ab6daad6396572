#!/usr/bin/env python3
"""Writes answers and labels to compare judges with people: HarmBench's validation sets, with the majority of three labels for each answer.

    judges.py HARMBENCH OUT    writes OUT/{text,images}.{responses,labels}.jsonl for `ecso eval judge` and `ecso eval agreement`

With `--chosen`, only the rows are written on which the questions and thresholds of the judge `llm` were chosen (70 random ones, and
those whose id's SHA-256 begins with an even byte); with `--rest`, only the others.
"""
import hashlib
import json
import random
import sys
from pathlib import Path


def rows(folder):
    for behaviour, records in json.loads((folder / "text_behaviors_val_set.json").read_text()).items():
        for number, record in enumerate(records):
            yield "text", f"t:{behaviour}:{number}", record["test_case"], record
    for behaviour, records in json.loads((folder / "multimodal_behaviors_val_set.json").read_text()).items():
        for number, record in enumerate(records):
            yield "images", f"m:{behaviour}:{number}", record["test_case"][1], record


def main():
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    source, out = map(Path, arguments)
    all_rows = list(rows(source))
    text = [row[1] for row in all_rows if row[0] == "text"]
    images = [row[1] for row in all_rows if row[0] == "images"]
    random.seed(3)
    random.shuffle(text)
    random.shuffle(images)
    chosen = {name for name in text + images if hashlib.sha256(name.encode()).digest()[0] % 2 == 0}
    chosen.update(text[:50] + images[:20])
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("text", "images"):
        with (out / f"{kind}.responses.jsonl").open("w") as responses, (out / f"{kind}.labels.jsonl").open("w") as labels:
            for row_kind, name, query, record in all_rows:
                if row_kind != kind or ("--chosen" in sys.argv and name not in chosen) or ("--rest" in sys.argv and name in chosen):
                    continue
                harmful = sum(record[f"human_{person}"] for person in range(3)) >= 2
                print(json.dumps({"id": name, "query": query, "response": record["generation"]}), file=responses)
                print(json.dumps({"id": name, "label": "harmful" if harmful else "safe"}), file=labels)


main()
