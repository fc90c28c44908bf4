"""Sections about time and memory: influence tables, ops, scaling, streaming, stores."""

from __future__ import annotations

from pages.markdown import duration, made_by, megabytes, table


def influence(section: dict) -> str:
    """Time and memory of one exact influence table, by method."""
    result = section["result"]
    sizes = result["sizes"]
    rows = []
    for name, row in sorted(result["methods"].items(), key=lambda i: i[1].get("seconds", 1e9)):
        if "error" in row:
            rows.append([name, "–", "–", "–", "–", row["error"].replace("|", "/")[:80]])
            continue
        covers = row.get("covers", "all")
        rows.append(
            [
                name,
                duration(row["seconds"]),
                f"{row['times_lddyn']:.1f}×",
                megabytes(row["peak_bytes"]),
                f"{row['memory_over_lddyn']:.1f}×",
                f"{row['relative_difference']:.0e}" + ("" if covers == "all" else f" ({covers})"),
            ]
        )
    best = result["methods"]["lddyn"]
    memory = (
        f" lddyn's peak memory is **{result['over_least_bytes']:.2f}×** the "
        f"{megabytes(result['least_bytes'])} of its inputs and one block's factors."
        if "least_bytes" in result
        else ""
    )
    rate = best.get("product_flops_per_second")
    faster = (
        f" (oneDNN computes its products with weights at {rate / 1e9:.0f} GFLOP/s; at that rate "
        f"lddyn takes {best['seconds'] * rate / best['planned_flops']:.2f}× the planned time.)"
        if rate
        else ""
    )
    truth = f" Differences are to {result['truth']}." if "truth" in result else ""
    return (
        f"d = {sizes['hidden']}, {sizes['layers']} layers, T = {sizes['length']}, M = L = "
        f"{sizes['response']}, V = {sizes['vocabulary']:,}, float32, {result['threads']} thread"
        f"{'s' if result['threads'] > 1 else ''}"
        f"{'; one sequence on both sides' if result.get('self') else ''}.{truth}\n\n"
        + table(["method", "time", "/ lddyn", "peak memory", "/ lddyn", "difference"], rows)
        + f"\n\nThe planner counts {best['planned_flops'] / 1e9:.3g} GFLOP. At the "
        f"{best['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s of a matrix product, measured in the "
        f"same process, they take {duration(result['planned_seconds'])}; lddyn takes "
        f"**{result['over_plan']:.2f}×** that.{faster}{memory}\n\n<sub>{made_by(section)}</sub>"
    )


def ops(section: dict) -> str:
    """What each op does, what bounds it, and how close each backend comes; its largest case."""
    result = section["result"]
    backends = ("reference", "cpp", "triton", "cuda")
    rows = []
    for op, about in result["about"].items():
        some = [c for c in result["cases"] if c["op"] == op]
        largest = max(some, key=lambda c: c["seconds"] if c["way"] == "reference" else 0)["case"]
        ways = {c["way"]: c for c in some if c["case"] == largest}
        others = [c for way, c in ways.items() if way not in backends]
        best = min(others, key=lambda c: c["seconds"], default=None)
        rows.append(
            [
                f"`{op}`",
                about.replace("|", "/"),
                largest.replace("torch.", ""),
                ways["reference"]["bound"],
                *(closeness(ways.get(way)) for way in backends),
                f"{best['way']}: {closeness(best)}" if best else "–",
            ]
        )
    header = ["op", "what it does", "case", "bound", *backends, "best opponent"]
    return (
        "The slowest case of each op: median time, and the share of the ceiling (FLOP/s of a "
        "square product, or bytes/s of a copy) measured in the same run. ✗: further from float64 "
        "than twice plain torch. All cases are in the results file.\n\n"
        f"{table(header, rows)}\n\n<sub>{made_by(section)}</sub>"
    )


def closeness(case: dict | None) -> str:
    """Time and share of the ceiling of one measured case."""
    if case is None:
        return "–"
    wrong = "" if case["match"] else " ✗"
    return f"{duration(case['seconds'])}, {case['percent_of_ceiling']:.0f} %{wrong}"


def scaling(section: dict) -> str:
    """Time and memory as one size changes."""
    points = section["result"]
    names = {"response": "M = L", "length": "T", "vocabulary": "V", "layers": "layers"}
    rows = []
    for key, title in names.items():
        some = [p for p in points if p["varied"] == key and "seconds" in p]
        rows.append(
            [
                title,
                " / ".join(f"{p['value']:,}" for p in some),
                " / ".join(f"{p['seconds']:.2g}" for p in some) + " s",
                " / ".join(f"{p['peak_bytes'] / 1e6:.0f}" for p in some) + " MB",
            ]
        )
    text = table(["varied", "values", "time", "peak memory"], rows)
    return (
        "Base: d = 256, 4 layers, T = 128, M = L = 32, V = 8,192, one thread. Plot: "
        "[`benchmarks/results/scaling.png`](../benchmarks/results/scaling.png).\n\n"
        f"{text}\n\n<sub>{made_by(section)}</sub>"
    )


def streaming(section: dict) -> str:
    """A model on disk against the same model in memory."""
    r = section["result"]
    sizes = r["sizes"]
    rows = []
    for name, row in r["ways"].items():
        rows.append(
            [
                name,
                duration(row["seconds"]),
                f"{row['seconds_over_in_memory']:.2f}×",
                f"{row['processor_seconds_over_in_memory']:.2f}×",
                megabytes(row["weights_resident_bytes"]),
                megabytes(row["peak_bytes"]),
                f"{row['bytes_read'] / 1e9:.1f} GB" if "bytes_read" in row else "–",
                "–"
                if name == "in memory"
                else "to the bit"
                if row["equal"]
                else f"{row['largest_difference']:.0e}",
            ]
        )
    some = r["ways"]["streamed"]
    header = [
        "way",
        "time",
        "/ in memory",
        "processor time",
        "parameters held",
        "peak",
        "read",
        "table equal",
    ]
    threads = "one thread" if r["threads"] == 1 else f"{r['threads']} threads"
    return (
        f"Random Llama, d = {sizes['hidden']}, {sizes['layers']} layers, V = "
        f"{sizes['vocabulary']:,}, float32: {megabytes(r['weight_bytes'])} in {r['shards']} files, "
        f"**{r['weights_over_budget']:.1f}×** the budget of {megabytes(r['budget_bytes'])} "
        f"({megabytes(some['outside_blocks_bytes'])} outside the blocks and {some['slots']} slots "
        f"of {megabytes(some['slot_bytes'])}). T = {sizes['length']}, M = L = {sizes['response']}, "
        f"{threads}, fastest of {r['rounds']} rounds.\n\n{table(header, rows)}\n\n"
        f"<sub>{made_by(section)}</sub>"
    )


def norms_large(section: dict) -> str:
    """Cost of all block norms at a large vocabulary."""
    r = section["result"]
    return (
        f"`frobenius()` of all {r['tokens']} x {r['tokens']} token pairs at V = "
        f"{r['vocabulary']:,} (random Llama, d = {r['hidden']}, {r['layers']} layers, T = "
        f"{r['length']}, memory = {r['memory']}), to a relative standard error of at most "
        f"{100 * r['error']:.1f} %: **{duration(r['seconds'])}** on one thread, "
        f"**{megabytes(r['peak_bytes'])}** over the loaded model and traces. Dense, the kernel "
        f"would take {r['dense_bytes'] / 1e12:.0f} TB.\n\n<sub>{made_by(section)}</sub>"
    )


def store(section: dict) -> str:
    """What kills and damage did to a store, and how fast it is."""
    result = section["result"]
    killed, damaged, speed = result["killed"], result["damaged"], result["speed"]
    files = "bit-identical" if killed["bit_identical"] else "**different**"
    rows = [
        [
            f"{killed['tokens']:,} tokens, writer killed {killed['kills']} times and resumed",
            f"{killed['lost']} lost, {killed['duplicated']} duplicated; {killed['shards']} shards, "
            f"journal and manifest {files} to those of an uninterrupted run",
        ],
        [
            f"{damaged['files']:,} stores damaged in {len(damaged['kinds'])} ways, opened and read",
            f"{damaged['silently_wrong']} silently wrong, {damaged['crashes']} crashes; "
            f"{damaged['refused']:,} refused, {damaged['right']:,} read in full all the same",
        ],
        ["append, flush (synced to disk)", f"{speed['write_gib_per_second']:.2f} GiB/s"],
        ["verify every byte", f"{speed['verify_gib_per_second']:.1f} GiB/s"],
        [
            f"{speed['queries']} tokens against {killed['tokens']:,} of width {result['width']}, "
            f"top {speed['k']}",
            duration(speed["query_seconds"]),
        ],
    ]
    return table(["what", "measured"], rows) + f"\n\n<sub>{made_by(section)}</sub>"


def memory(section: dict) -> str:
    """Growth of resident memory against `memory=`, by analysis and budget."""
    from lddyn.memory import FLOOR

    result, made = section["result"], {}
    budgets = list(dict.fromkeys(c["memory"] for c in result["cells"]))
    budgets.sort(key=lambda b: next(c["budget_bytes"] for c in result["cells"] if c["memory"] == b))
    for cell in result["cells"]:
        limit = 1.25 * cell["budget_bytes"] + FLOOR
        grown = f"{cell['grown_bytes'] / 2**20:,.0f} MiB"
        time = duration(cell["seconds"])
        time = f"stopped after {time}" if cell.get("stopped") else time
        text = f"{grown}, {cell['grown_over_budget']:.2f}×, {time}"
        if cell["refused"]:
            text = f"refused ({grown})"
        elif cell["grown_bytes"] > limit:
            text = f"**{text}: beyond the promise**"
        made[cell["work"], cell["memory"]] = text
    names = list(dict.fromkeys(c["work"] for c in result["cells"]))
    rows = [[name, *(made.get((name, b), "not measured") for b in budgets)] for name in names]
    sizes, first = result["sizes"], result["cells"][0]
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    kept = {commit for c in result["cells"] if (commit := c["commit"])}
    return (
        f"SmolLM2 with {first['model_bytes'] / 2**20:,.0f} MiB of float32 weights (half of that in "
        f"bfloat16), all trained but where LoRA is named; {sizes['pairs']} pairs, prompts and "
        f"responses of {sizes['tokens']} random tokens each, {sizes['long']} where it says long; "
        f"{threads}, a process for each cell, on a busy machine. Growth of resident memory at its "
        f"peak, that over the budget, and time:\n\n"
        f"{table(['analysis', *budgets], rows)}\n\n"
        f"*{made_by(section)}; cells of commit {', '.join(sorted(kept))}.*"
    )
