r"""Does the anchor hold with prompts of another kind? The demo's questions, asked in code alone.

    python benchmarks/other_prompts.py code_cache
    LRMC_CACHE=code_cache lrmc compare --output runs_code --methods sft,sft_anchor \
        'compare.learning_rates=[1e-4]' compare.name=code

Writes the demo's files into a cache of their own: the same database, questions and answers, but
no instruction and no schema in words. A prompt is the CREATE TABLE statements of the database, and
the question as a comment of SQL.
"""

import argparse
import json
from pathlib import Path

from lrmc_ray.tasks.demo.files import demo_files

SCHEMA = """\
CREATE TABLE country (name TEXT PRIMARY KEY, capital TEXT, continent TEXT, population INTEGER, \
area_km2 REAL, currency TEXT);
CREATE TABLE city (name TEXT, country TEXT REFERENCES country, population INTEGER, latitude REAL, \
longitude REAL);
CREATE TABLE border (country TEXT REFERENCES country, neighbour TEXT REFERENCES country);
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("cache", type=Path, help="directory to write, for LRMC_CACHE")
    files = demo_files(parser.parse_args().cache.resolve())
    for path in (files.train, files.dev, files.test):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            prompt = {"role": "user", "content": f"{SCHEMA}-- {row['question']}"}
            row["messages"] = [prompt, row["messages"][-1]]
        lines = [json.dumps(row, sort_keys=True) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{len(rows):>4} questions in {path}")


if __name__ == "__main__":
    main()
