"""Tables and plots from records. No figure is typed by hand."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Row = dict[str, Record]


def render(found: Iterable[Record], out: Path, baseline: str = "eager") -> list[Path]:
    """Write attention.md and a plot a device into a folder.

    Args:
        found: Records, oldest first. A row of a table comes from the last run that has its case, dtype and direction.
        baseline: Contender that ratios are taken of: its median by theirs, both of one run.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections, files = [], []
    for device, rows in _by_device(found).items():
        plot = out / f"attention-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png"
        _plot(device, rows, plot)
        files.append(plot)
        sections.append(f"## {device}\n\n![TFLOP/s against case]({plot.name})\n")
        for direction in sorted({direction for direction, _, _ in rows}, reverse=True):
            part = {(case, dtype): row for (d, case, dtype), row in rows.items() if d == direction}
            sections.append(f"### {_TITLES[direction]}\n\n{table(part, baseline)}\n")
        sections.append(_sources(rows.values()))
    text = f"# Attention\n\nMilliseconds (median), and how many times as fast as `{baseline}` in the same run.\n"
    page = out / "attention.md"
    page.write_text("\n".join([text, *sections]))
    return [page, *files]


_TITLES = {"forward": "Forward", "both": "Forward and backward"}


def table(rows: dict[tuple[str, str], Row], baseline: str) -> str:
    """Return a Markdown table: a row a case and dtype, a column a contender."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["case", "dtype", *names], ["---", "---", *["---:"] * len(names)]]
    for (case, dtype), row in rows.items():
        lines.append([case, dtype, *(cell(row.get(name), row.get(baseline)) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Record | None, baseline: Record | None) -> str:
    """Return a time and its ratio, or why there is none."""
    if record is None:
        return ""
    if record["median_ms"] is None:
        return record["gate"]
    text = f"{record['median_ms']:.4g}"
    ratio = speedup(record, baseline)
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def speedup(record: Record, baseline: Record | None) -> float | None:
    """Return the baseline's median by the record's, where both have one in the same run."""
    if baseline is None or None in (baseline["median_ms"], record["median_ms"]) or baseline["run"] != record["run"]:
        return None
    return baseline["median_ms"] / record["median_ms"]


def _by_device(found: Iterable[Record]) -> dict[str, dict[tuple[str, str, str], Row]]:
    """Return device -> (direction, case, dtype) -> contender -> record, the last run's."""
    devices: dict[str, dict[tuple[str, str, str], Row]] = {}
    for record in found:
        rows = devices.setdefault(record["device"], {})
        key = record["direction"], record["case"], record["dtype"]
        row = rows.setdefault(key, {})
        if any(other["run"] != record["run"] for other in row.values()):
            row.clear()
        row[record["contender"]] = record
    return devices


def _sources(rows: Iterable[Row]) -> str:
    """List the runs that the tables of a device come from."""
    runs = {record["run"]: record for row in rows for record in row.values()}
    lines = []
    for run, record in runs.items():
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        commit = "no commit" if record["commit"] is None else f"commit {record['commit'][:12]}"
        dirty = " with changes" if record["dirty"] else ""
        lines.append(f"- run {run}, {record['date']}, {commit}{dirty}, {versions}: `{record['command']}`")
    return "\n".join(["Runs:", "", *lines, ""])


def _plot(device: str, rows: dict[tuple[str, str, str], Row], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = sorted({(dtype, direction) for direction, _, dtype in rows}, key=lambda p: (p[0], p[1] != "forward"))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(12, 3.4 * len(panels)), layout="constrained")
    for axes, (dtype, direction) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        part = {case: row for (d, case, t), row in rows.items() if (t, d) == (dtype, direction)}
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            timed = [(i, row[name]["tflops"]) for i, row in enumerate(part.values()) if name in row]
            bars = [(i + (place + 0.5) * width - 0.4, tflops) for i, tflops in timed if tflops is not None]
            axes.bar([x for x, _ in bars], [y for _, y in bars], width, label=name, color=f"C{place}")
        peaks = [next(iter(row.values()))["matmul_peak_tflops"] for row in part.values()]
        axes.hlines(peaks, [i - 0.45 for i in range(len(part))], [i + 0.45 for i in range(len(part))], "gray", "dashed")
        axes.set_xticks(range(len(part)), list(part))
        axes.set(title=f"{_TITLES[direction]}, {dtype}", ylabel="TFLOP/s on real tokens", xlabel="case (B x W x E)")
    figure.axes[0].plot([], [], "--", color="gray", label="torch matmul, same run")
    figure.suptitle(device)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)
