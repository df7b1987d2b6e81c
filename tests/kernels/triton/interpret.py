"""Run every case in Triton's interpreter and print what deviates; a process either interprets or compiles."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from arkinfer.exporters.kernels.triton.kernel import ARCHS
from tests.kernels.triton.cases import borders, cases
from tests.kernels.triton.samples import copied, deviations, draw, expected, launch


def main() -> None:
    wanted = sys.argv[1:]
    report = {}
    for index, case in enumerate([*cases(), *borders()]):
        if wanted and case.kernel not in wanted:
            continue
        values = draw(case)
        got = copied(values)
        try:
            launch(case, got, ARCHS[index % len(ARCHS)])  # each has tile sizes of its own
            found = [[item.argument, item.error, item.allowed, item.fine] for item in
                     deviations(case, expected(case, values), got)]  # fmt: skip
        except Exception:
            found = [[traceback.format_exc().strip().splitlines()[-1], 0.0, 0.0, False]]
            if wanted:
                traceback.print_exc()
        report[str(case)] = found
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
