"""The table of docs/gpu.md: what kernels move, from benchmarks/results/traffic-sm80."""

from collections import Counter

from .figures import results, table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f}x" if whole else ""


def traffic() -> str:
    rows = []
    for one in results("traffic-sm80")["records"]:
        issued = Counter()
        for launched in one["launches"]:
            issued.update(launched["issued"])
        names = dict.fromkeys(run["kernel"].partition(".")[2] for run in one["launches"])
        most = ", ".join(f"{kind} {n / issued.total():.0%}" for kind, n in issued.most_common(3))
        accesses = sum(launched["shared"] for launched in one["launches"])
        rows.append(
            [
                f"`{one['op']}`",
                f"`{one['case']}`",
                one["direction"],
                " ".join(f"`{name}`" for name in names),
                f"{one['least']:,}",
                *(_share(one[name], one["least"]) for name in ("asked", "sectors", "distinct")),
                _share(one["conflicts"], accesses) if accesses else "",
                f"{one['instructions per element']:.1f}",
                most,
            ]
        )
    head = (
        "op", "case", "pass", "kernels", "least bytes", "asked", "sectors", "distinct",
        "conflicts", "instructions", "most of them",
    )  # fmt: skip
    return table(head, rows)
