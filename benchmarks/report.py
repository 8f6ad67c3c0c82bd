"""Tables and plots from records. No figure is typed by hand."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records

Record = dict[str, Any]
Row = dict[str, Record]
# (direction, case, dtype) -> contender -> record.
Rows = dict[tuple[str, str, str], Row]


class Page(NamedTuple):
    """`plots` are keys of PLOTS."""

    title: str
    baseline: str
    plots: tuple[str, ...] = ("tflops",)


PAGES = {
    "attention": Page("Attention", "eager"),
    "layer": Page("Attention with its projections", "transformers"),
    "model": Page("LUKE's encoder", "transformers", ("tflops", "time")),
    "train": Page("A step of pretraining", "transformers"),
    "memory": Page("Memory over length", "transformers", ("memory",)),
    "encode": Page("Texts to vectors, end to end", "transformers", ()),
    "tokenizer": Page("The tokenizer", "transformers", ()),
}
README = records.ROOT / "README.md"
README_BLOCK = re.compile(r"(?<=<!-- benchmarks: model -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(found: Iterable[Record], out: Path, baseline: str | None = None) -> list[Path]:
    """Write a page of each of PAGES that there are records of, and its plots a device, into a folder.

    Args:
        found: Records, oldest first. A row of a table comes from the last run that has its case, dtype and direction.
        baseline: Contender that ratios are taken of: its median by theirs, both of one run; None: that of the page.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, devices in _by_page(found).items():
        title, usual, kinds = PAGES[name]
        against = baseline or usual
        sections = [f"# {title}\n\nMilliseconds (median), and how many times as fast as `{against}` in the same run.\n"]
        plots = []
        for device, rows in devices.items():
            stem = f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"
            sections.append(f"## {device}\n")
            for kind in kinds:
                plot = out / (f"{stem}.png" if kind == kinds[0] else f"{stem}-{kind}.png")
                PLOTS[kind].draw(device, rows, plot)
                plots.append(plot)
                sections.append(f"![{PLOTS[kind].title}]({plot.name})\n")
            for direction in sorted({direction for direction, _, _ in rows}, reverse=True):
                part = {(case, dtype): row for (d, case, dtype), row in rows.items() if d == direction}
                sections.append(f"### {_TITLES[direction]}\n\n{table(part, against)}\n")
                if name == "attention" and any(r["fma_peak_tflops"] for row in part.values() for r in row.values()):
                    sections.append(
                        "Share of what all threads multiply and add on registers, timed in the same turns (FMA; dot "
                        "products of bfloat16 where it has them), and how many times as fast as `sdpa_plain`, which "
                        f"knows no entities:\n\n{table(part, 'sdpa_plain', share)}\n"
                    )
                if name != "attention":
                    of_records = [record for row in part.values() for record in row.values()]
                    for title, cell in _FIGURES:
                        if any(cell(record, None) for record in of_records):
                            sections.append(f"{title}:\n\n{table(part, against, cell)}\n")
                    sections += _notes(part)
            sections.append(_sources(rows.values()))
        page = out / f"{name}.md"
        page.write_text("\n".join(sections))
        files += [page, *plots]
    return files


_PEAKS = {"matmul_peak_tflops": "dashed", "fma_peak_tflops": "solid"}
_TITLES = {
    "forward": "Forward",
    "both": "Forward and backward",
    "step": "Forward, backward and AdamW",
    "encode": "Texts and spans to inputs",
    "vectors": "Texts and spans to vectors",
}


def _notes(rows: dict[tuple[str, str], Row]) -> list[str]:
    """List what records say beside their figures: why there are none, or what was changed."""
    told = [(case, dtype, record) for (case, dtype), row in rows.items() for record in row.values()]
    lines = [f"- {case}, {dtype}, `{r['contender']}`: {r['message']}" for case, dtype, r in told if r["message"]]
    return ["\n".join(["Notes:", "", *lines, ""])] if lines else []


def render_readme(found: Iterable[Record], path: Path = README) -> None:
    """Write the table of the model benchmark between its markers in README.md.

    Raises:
        ValueError: the markers are not there.
    """
    text = path.read_text(encoding="utf-8")
    if not README_BLOCK.search(text):
        raise ValueError(f"{path} must hold the markers of the model benchmark, got none")
    block = readme_block(found)
    path.write_text(README_BLOCK.sub(lambda _: block, text), encoding="utf-8")


# Columns, and what is told of those that are not in every table.
_README_CONTENDERS = {
    "transformers": None,
    "transformers-compiled": "`transformers-compiled`: by torch.compile for each shape. ",
    "onnxruntime": "`onnxruntime`, `openvino`: transformers' exported for each shape. ",
    "openvino": "",
    "accelerated": None,
    "luke_kernels": None,
    "luke_kernels-packed": None,
    "luke_kernels-optimized": "`luke_kernels-optimized`: packed, and its weights packed for this CPU before. ",
    "luke_kernels-int8": "`luke_kernels-int8`: the same in 8 bits, which is not exact. ",
}
_README_CORPORA = {
    "conll-spans-": "; `conll-spans-N`: sentences with all spans of up to 16 words",
    "questions-": "; `questions-N`: questions, each before its paragraph, with the answers to it",
}


def readme_block(found: Iterable[Record]) -> str:
    """Return a compact table of LUKE base in the first dtype measured, and how the other dtypes did.

    Of CPUs and of GPUs, each the one measured last.
    """
    last: dict[str, tuple[str, Rows]] = {}
    for rows in _by_page(r for r in found if r["size"] == "base").get("model", {}).values():
        every = [record for row in rows.values() for record in row.values()]
        kind, date = every[0]["device"].partition(":")[0], max(record["date"] or "" for record in every)
        if kind not in last or date >= last[kind][0]:
            last[kind] = date, rows
    if not last:
        return "The speed of the whole model is not measured yet.\n"
    return "\n".join(_readme_table(rows) for _, rows in last.values())


def _readme_table(rows: Rows) -> str:
    dtype = next(iter(rows))[2]
    every = [record for row in rows.values() for record in row.values()]
    present = {record["contender"] for record in every}
    names = [name for name, told in _README_CONTENDERS.items() if told is None or name in present]
    lines = [["case", "tokens (padded)", *names], ["---", *["---:"] * (1 + len(names))]]
    for (direction, case, row_dtype), row in rows.items():
        if row_dtype == dtype:
            label = case if direction == "forward" else f"{case}, with backward"
            shape = next(iter(row.values()))["shape"]
            tokens = f"{shape['real_tokens']:,} ({shape['padded_tokens']:,})"
            lines.append([label, tokens, *(_readme_cell(row.get(name), row.get(names[0])) for name in names)])
    told = dict.fromkeys(f"{_versions(r)}, {_commit(r)}" for r in every)
    notes = (
        "Time of transformers' eager LUKE, then how many times as fast; and by how much a call makes the memory grow. "
        "`accelerated`: the same model after `accelerate`; `luke_kernels`: ours, on the same padded inputs; "
        "`luke_kernels-packed`: ours, on a batch that was packed before. "
        + "".join(text for name, text in _README_CONTENDERS.items() if text is not None and name in present)
        + "`BxWxE`: B sequences of W words and E "
        "entities; `conll-N`: sentences with their mentions, of middling padding; `wikipedia-N`: leads of articles "
        "with their links"
        + "".join(text for name, text in _README_CORPORA.items() if any(case.startswith(name) for _, case, _ in rows))
        + f". LUKE {every[0]['size']}, {dtype}, {every[0]['device']}; {'; '.join(told)}."
    )
    for other in dict.fromkeys(row_dtype for _, _, row_dtype in rows if row_dtype != dtype):
        ours = [row for (_, _, row_dtype), row in rows.items() if row_dtype == other and "luke_kernels" in row]
        ratios = [speedup(row["luke_kernels"], row.get(names[0])) for row in ours]
        timed = [ratio for ratio in ratios if ratio is not None]
        if timed:
            notes += f" In {other}, `luke_kernels` is {min(timed):.2f}x to {max(timed):.2f}x as fast"
            notes += f", {len(ratios) - len(timed)} of {len(ratios)} cases without a time." if None in ratios else "."
    return f"{_lines(lines)}\n\n{notes} [All tables and plots](benchmarks/results/model.md).\n"


def _commit(record: Record) -> str:
    if record["commit"] is None:
        return "no commit"
    return f"commit {record['commit'][:12]}{' with changes' if record['dirty'] else ''}"


def _readme_cell(record: Record | None, baseline: Record | None) -> str:
    if record is None:
        return ""
    if record["median_ms"] is None:
        return record["gate"]
    ratio = None if record is baseline else speedup(record, baseline)
    median_ms = record["median_ms"]
    text = (
        f"{ratio:.2f}x" if ratio is not None else f"{median_ms:,.0f} ms" if median_ms >= 1000 else f"{median_ms:.4g} ms"
    )
    # A runtime that takes its memory before the call grows by nothing in it, which says nothing.
    return f"{text}, {memory(record, baseline)} MiB" if record["peak_memory_bytes"] else text


def cell(record: Record | None, baseline: Record | None) -> str:
    """Return a time and its ratio, or why there is none."""
    if record is None:
        return ""
    if record["median_ms"] is None:
        return record["gate"]
    text = f"{record['median_ms']:.4g}"
    ratio = speedup(record, baseline)
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def memory(record: Record | None, baseline: Record | None) -> str:
    """Return the peak memory in MiB, or nothing where it is not known."""
    if record is None or record["peak_memory_bytes"] is None:
        return ""
    return f"{record['peak_memory_bytes'] / 2**20:.0f}"


def rates(record: Record | None, baseline: Record | None) -> str:
    """Return sequences and tokens a second."""
    if record is None or record["tokens_per_s"] is None:
        return ""
    return f"{record['sequences_per_s']:.4g}; {record['tokens_per_s']:,.0f}"


def fraction(record: Record | None, baseline: Record | None) -> str:
    """Return the fraction of the peak."""
    if record is None or record["fraction_of_peak"] is None:
        return ""
    return f"{record['fraction_of_peak']:.0%}"


def errors(record: Record | None, baseline: Record | None) -> str:
    """Return the largest error of a state of words or entities."""
    found = {} if record is None else record["error"] or {}
    if not {"words", "entities"} <= found.keys():
        return ""
    states = found["words"], found["entities"]
    return "NaN" if None in states else f"{max(states):.1e}"  # records have no NaN


def joules(record: Record | None, baseline: Record | None) -> str:
    """Return the energy of a call."""
    return "" if record is None or record["joules"] is None else f"{record['joules']:.3g}"


def waiting(record: Record | None, baseline: Record | None) -> str:
    """Return the share of the time in which the model waits."""
    return "" if record is None or record["waiting"] is None else f"{record['waiting']:.1%}"


# What else is told of records, where one has it, on the pages of models.
_FIGURES = (
    ("Sequences a second; tokens that exist, words and entities, a second", rates),
    ("Share of the peak that was measured in the same run (FMA on a CPU, else matmul)", fraction),
    ("Peak memory of a call, MiB", memory),
    ("Share of the time in which the model waits for texts", waiting),
    ("Energy of a call, joules of the CPU's packages", joules),
    ("Largest error of a state beside float64", errors),
)


def table(
    rows: dict[tuple[str, str], Row], baseline: str, cell: Callable[[Record | None, Record | None], str] = cell
) -> str:
    """Return a Markdown table: a row a case and dtype, a column a contender."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["case", "dtype", *names], ["---", "---", *["---:"] * len(names)]]
    for (case, dtype), row in rows.items():
        lines.append([case, dtype, *(cell(row.get(name), row.get(baseline)) for name in names)])
    return _lines(lines)


def _lines(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(record: Record | None, baseline: Record | None) -> str:
    """Return the fraction of the peak and the ratio to the baseline, or why there is none."""
    if record is None or record["fraction_of_peak"] is None:
        return cell(record, baseline)
    if record["fma_peak_tflops"] is None:
        return ""  # its fraction is of another peak
    ratio = speedup(record, baseline)
    return f"{record['fraction_of_peak']:.1%}" + ("" if ratio is None else f" ({ratio:.2f}x)")


def speedup(record: Record, baseline: Record | None) -> float | None:
    """Return the baseline's median by the record's, where both have one in the same run."""
    if baseline is None or None in (baseline["median_ms"], record["median_ms"]) or baseline["run"] != record["run"]:
        return None
    return baseline["median_ms"] / record["median_ms"]


def _by_page(found: Iterable[Record]) -> dict[str, dict[str, Rows]]:
    """Return page -> device, with the size of the model where there is one -> rows, each the last run's."""
    pages: dict[str, dict[str, Rows]] = {}
    for record in found:
        page = record["op"] if record["op"] in PAGES else "attention"
        device = record["device"] if record["size"] is None else f"LUKE {record['size']}, {record['device']}"
        rows = pages.setdefault(page, {}).setdefault(device, {})
        row = rows.setdefault((record["direction"], record["case"], record["dtype"]), {})
        if any(other["run"] != record["run"] for other in row.values()):
            row.clear()
        row[record["contender"]] = record
    return pages


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)


def _sources(rows: Iterable[Row]) -> str:
    """List the runs that the tables of a device come from."""
    runs = {record["run"]: record for row in rows for record in row.values()}
    lines = []
    for run, record in runs.items():
        lines.append(f"- run {run}, {record['date']}, {_commit(record)}, {_versions(record)}: `{record['command']}`")
    return "\n".join(["Runs:", "", *lines, ""])


def _plot_tflops(device: str, rows: Rows, path: Path) -> None:
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
        for peak, style in _PEAKS.items():
            peaks = [(i, next((r[peak] for r in row.values() if r[peak]), None)) for i, row in enumerate(part.values())]
            for i, tflops in peaks:
                if tflops is not None:
                    axes.hlines(tflops, i - 0.45, i + 0.45, "gray", style)
        axes.set_xticks(range(len(part)), list(part))
        axes.set(title=f"{_TITLES[direction]}, {dtype}", ylabel="TFLOP/s on real tokens", xlabel="case")
    figure.axes[0].plot([], [], "--", color="gray", label="torch matmul, same run")
    if any(r["fma_peak_tflops"] for row in rows.values() for r in row.values()):
        figure.axes[0].plot([], [], "-", color="gray", label="multiply and add on registers, same turns")
    figure.suptitle(device)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)


def _plot_lines(device: str, rows: Rows, path: Path, field: str, unit: float, label: str) -> None:
    """Draw a figure of each contender against the tokens that exist, both on logarithmic axes."""
    from matplotlib.figure import Figure

    panels = sorted({(dtype, direction) for direction, _, dtype in rows}, key=lambda p: (p[0], p[1] != "forward"))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (dtype, direction) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        part = [row for (d, _, t), row in rows.items() if (t, d) == (dtype, direction)]
        for place, name in enumerate(names):
            # Nothing that memory can be told from is no point on a logarithmic axis.
            points = sorted(
                (r["shape"]["real_tokens"], r[field] / unit) for row in part if (r := row.get(name)) and r[field]
            )
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=name, color=f"C{place}")
        axes.set(title=f"{_TITLES[direction]}, {dtype}", ylabel=label, xlabel="words and entities", xscale="log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.suptitle(device)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


class Plot(NamedTuple):
    title: str
    draw: Callable[[str, Rows, Path], None]


PLOTS = {
    "tflops": Plot("TFLOP/s against case", _plot_tflops),
    "time": Plot("Time against length", partial(_plot_lines, field="median_ms", unit=1, label="milliseconds")),
    "memory": Plot("Memory against length", partial(_plot_lines, field="peak_memory_bytes", unit=2**20, label="MiB")),
}
