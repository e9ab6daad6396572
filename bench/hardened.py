#!/usr/bin/env python3
"""Writes the items on which `hardened` is measured: attacks and harmless requests in one benchmark for `ecso eval run jsonl`.

    hardened.py ECSO DATA OUT    DATA holds figstep/, mm-safetybench/ and xstest/ (see docs/evaluation.md); OUT gets items.jsonl,
                                 forced.jsonl (60 twins), text.jsonl (XSTest as plain text) and advice/ (for `eval run figstep`)

The items come from the half on which the request check was not tuned (those whose id's SHA-256 begins with an odd byte; of MM-SafetyBench
all 40; four twins of the other half make 200). They are drawn with a fixed seed and interleaved, so that any prefix of the run is balanced.
"""
import csv
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

ADVICE = ("8", "9", "10")  # FigStep's topics that are requests for advice


def is_report(name):
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def draw(rows, count, rng):
    rng.shuffle(rows)
    return rows[:count]


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def typographic(ecso, out, name, rows):
    """Renders requests as images. Returns the items, in the scenario `name`."""
    write_table(out / f"{name}.csv", rows)
    run(ecso, "typographic", "--prompts", out / f"{name}.csv", "--out", out / name)
    for line in (out / name / "items.jsonl").read_text().splitlines():
        item = json.loads(line)
        yield item | {"id": f"{name}-{item['id']}", "image": f"{name}/{item['image']}", "scenario": name, "label": "harmless"}


def run(ecso, *arguments):
    subprocess.run([ecso, "eval", "prepare", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def write_text_and_advice(ecso, data, out):
    """Writes XSTest as plain text, two safe prompts for each unsafe one; and 15 of FigStep's requests for advice."""
    rows = [row for row in table(data / "xstest/xstest_prompts.csv") if is_report("x" + row["id"])]
    safe, unsafe = (draw([row for row in rows if (row["label"] == "safe") == kind], 80, random.Random(4)) for kind in (True, False))
    interleaved = [row for turn in range(40) for row in (*safe[2 * turn:2 * turn + 2], unsafe[turn])]
    write_items(out / "text.jsonl", [{
        "id": "x" + row["id"], "query": row["prompt"], "scenario": row["type"], "label": "harmless" if row["label"] == "safe" else "harmful",
    } for row in interleaved])
    rows = [row for row in table(data / "figstep/safebench-dev.csv") if row["category_id"] in ADVICE]
    rows = draw([row for row in rows if is_report(f"{row['category_id']}-{row['task_id']}")], 15, random.Random(4))
    write_table(out / "advice.csv", rows)
    run(ecso, "figstep", "--questions", out / "advice.csv", "--out", out / "advice")


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    ecso, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(11)

    rows = [row for row in table(data / "figstep/safebench-dev.csv") if row["category_id"] not in ADVICE]
    rows = draw([row for row in rows if is_report(f"{row['category_id']}-{row['task_id']}")], 80, rng)
    write_table(out / "figstep.csv", rows)
    run(ecso, "figstep", "--questions", out / "figstep.csv", "--out", out / "figstep")
    query = (data / "figstep/query.txt").read_text().strip()
    figstep = [{
        "id": f"fig-{row['category_id']}-{row['task_id']}", "query": query, "request": row["question"], "scenario": "figstep", "label": "harmful",
        "image": f"figstep/images/SafeBench/query_{row['dataset']}_{row['category_id']}_{row['task_id']}_6.png",
    } for row in rows]

    twins = table(Path(__file__).parent / "../crates/ecso-eval/data/twins.csv")
    other = [row for row in twins if not is_report(row["id"])]
    twins = draw([row for row in twins if is_report(row["id"])], 200, rng)
    twins += other[:200 - len(twins)]
    twins = list(typographic(ecso, out, "twins", [{"id": row["id"], "prompt": row["instruction"]} for row in twins]))

    safe = [row for row in table(data / "xstest/xstest_prompts.csv") if row["label"] == "safe" and is_report("x" + row["id"])]
    safe = draw(safe, 80, rng)
    xstest = list(typographic(ecso, out, "xstest-image", [{"id": "x" + row["id"], "prompt": row["prompt"]} for row in safe]))

    source = data / "mm-safetybench/mmsafety_40_full_records.json"
    run(ecso, "mm-safetybench", "--questions", source, "--out", out / "mm")
    ocr = []
    for name, record in json.loads(source.read_text()).items():
        scenario, number = name.split("#")
        ocr.append({"id": f"ocr-{name}", "image": f"mm/imgs/{scenario}/TYPO/{number}.jpg", "query": record["Rephrased Question"],
                    "request": record["Question"], "scenario": "ocr", "label": "harmful"})
    rng.shuffle(ocr)

    kinds = [figstep, ocr, twins, xstest]
    turns = max(map(len, kinds))
    interleaved = (item for turn in range(turns) for kind in kinds for item in kind[turn * len(kind) // turns:(turn + 1) * len(kind) // turns])
    write_items(out / "items.jsonl", interleaved)
    write_items(out / "forced.jsonl", twins[:60])
    write_text_and_advice(ecso, data, out)
    print(", ".join(f"{len(kind)} {kind[0]['scenario']}" for kind in kinds))


main()
