"""The section about other libraries' Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator

from pages.markdown import duration, made_by, megabytes, small_bytes, table

CASES = {
    "tokens": "(a) {length} loss tokens of one sequence",
    "sequences": "(b) {count} whole sequences",
}


def peers(section: dict) -> str:
    """Grams of other libraries: time, memory, what is kept, errors; and position gradients."""
    result = section["result"]
    parts = [methods(result, case) for case in CASES]
    for letter, case in zip("ab", CASES, strict=True):
        parts += (f"({letter}) {sentence}" for sentence in fastest(result, case))
    versions = {n: v for used in result["versions"].values() for n, v in used.items()}
    common = ("python", "torch", "transformers", "lddyn")
    others = ", ".join(f"{n} {v}" for n, v in sorted(versions.items()) if n not in common)
    footer = f"<sub>{others}. {made_by(section)}</sub>"
    return "\n\n".join([*parts, positions(result["positions"]), footer])


def methods(result: dict, case: str) -> str:
    """A row per method of one case, the fastest first."""
    content, sizes = result["cases"][case], result["sizes"]
    rows = []
    ways = sorted(content["rows"].items(), key=lambda i: i[1].get("seconds", 1e9))
    for name, row in ways:
        if "error" in row:
            rows.append([name, *["–"] * 6, row["error"].replace("|", "/")[:80]])
            continue
        e = row["errors"]
        rows.append(
            [
                name,
                duration(row["seconds"]),
                f"{row.get('times_base', 0):.1f}×",
                megabytes(row["peak_bytes"]),
                small_bytes(row["stored_bytes"] / sizes["count"]),
                *(f"{e[k]:.2g}" if e[k] > 1e-4 else "exact" for k in ("full", "cover_scaled")),
                row["covers"],
            ]
        )
    header = [
        "method",
        "CPU time",
        f"/ {'lddyn' if case == 'tokens' else 'torch'}",
        "peak",
        "kept a row",
        "error",
        "of its share, rescaled",
        "parameters",
    ]
    cannot = "; ".join(f"{k}: {v}" for k, v in content["cannot"].items())
    title = CASES[case].format(**sizes)
    return f"**{title}**\n\n{table(header, rows)}\n\nNot here: {cannot}."


def fastest(result: dict, case: str) -> Iterator[str]:
    """The fastest sketch and the fastest exact Gram of a library, against lddyn's."""
    ways = {n: r for n, r in result["cases"][case]["rows"].items() if "seconds" in r}
    exact = {n for n, r in ways.items() if r["errors"]["cover"] < 1e-4}
    ours = {n for n in ways if n.startswith("lddyn")}
    others = {n for n in ways if not n.startswith(("lddyn", "torch,"))}
    for kind, some in (("sketch", others - exact), ("exact Gram", others & exact)):
        # Of loss tokens lddyn's exact Gram is put against sketches, too.
        mine = ours - exact if kind == "sketch" and case == "sequences" else ours & exact
        if not some or not mine:
            continue
        time = {n: r["seconds"] for n, r in ways.items()}
        name, best = min(some, key=time.__getitem__), min(mine, key=time.__getitem__)
        error, theirs = ways[best]["errors"]["full"], ways[name]["errors"]
        yield (
            f"The fastest {kind} of a library is {name}: "
            f"**{time[name] / time[best]:.1f}×** the time of {best} "
            f"({f'error {error:.2g}' if error > 1e-4 else 'exact'}); error "
            f"{theirs['full']:.2g} over all, {theirs['cover_scaled']:.2g} over its own "
            "parameters at the best scale."
        )


def positions(compared: dict) -> str:
    """Gradients by position of the input against gradients of loss tokens."""
    peer, cosine = compared.get("peer", {}), compared["cosine_of_same_token"]
    of_bergson = (
        f" bergson's own per-token Gram is that of the positions (to "
        f"{peer['error_as_positions']:.0e}) and {peer['errors']['cover']:.2f} off that of the "
        "loss tokens, over the parameters it sees."
        if "error_as_positions" in peer
        else ""
    )
    return (
        f"**(c) position gradients**: their Gram is {compared['gram_error']:.2f} off that of the "
        f"loss tokens, {compared['gram_error_scaled']:.2f} at the best scale; correlation off the "
        f"diagonal {compared['off_diagonal_correlation']:.2f}; cosine between the two gradients of "
        f"a token {cosine['least']:.2f} to {cosine['largest']:.2f}, median "
        f"{cosine['median']:.2f}.{of_bergson}"
    )
