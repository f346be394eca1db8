"""The table of parity's margins, from the files in benchmarks/results/parity-cpu-*.

Each is what `elmkernels parity --margins` wrote, in a process whose torch and MKL took the sums of
another processor: PROCESSORS says how.
"""

from collections import defaultdict
from typing import Any

from .figures import results, table

PROCESSORS = {
    "plain": "as it is",
    "avx2": "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2",
    "no-avx": "ATEN_CPU_CAPABILITY=default",
    "compatible": "MKL_CBWR=COMPATIBLE",
}
CLOSE = 2 / 3
DTYPES = ("float32", "bfloat16", "float16")


def _tensors(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [margin for record in records for margin in record["close"]]


def margins() -> str:
    by: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for name in PROCESSORS:
        for record in results(f"parity-cpu-{name}")["records"]:
            by[record["op"], record["dtype"]].append(record)
    rows = []
    for dtype in DTYPES:
        found = {op: records for (op, of), records in by.items() if of == dtype}
        for op, records in found.items():
            close = _tensors(records)
            if not close:
                continue
            nearest = max(close, key=lambda margin: margin["by_all"])
            rows.append(
                [
                    f"`{op}`",
                    dtype,
                    str(sum(record["cases"] for record in records)),
                    str(sum(margin["by_one"] > 1 for margin in close)),
                    str(sum(CLOSE < margin["by_one"] <= 1 for margin in close)),
                    str(sum(margin["by_all"] > CLOSE for margin in close)),
                    f"`{nearest['case']}`, {nearest['what']}: {nearest['by_all']:.0%}",
                ]
            )
    head = ("op", "dtype", "cases", "one: beyond", "one: close", "all: close", "nearest by all")
    return table(head, rows)


def processors() -> str:
    """What the table's runs were, and on what."""
    rows = []
    for name, setting in PROCESSORS.items():
        found = results(f"parity-cpu-{name}")
        kept = f"[data](../benchmarks/results/parity-cpu-{name}/results.json)"
        how = f"`{setting}`" if "=" in setting else setting
        rows.append([how, found["machine"]["cpu"], found["machine"]["isa"], kept])
    return table(("how", "processor", "torch's sums", "records"), rows)
