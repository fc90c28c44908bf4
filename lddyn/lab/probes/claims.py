"""The claim about the pass over a probing set."""

from __future__ import annotations

from lddyn.lab.record import Claim, Row, Rows
from lddyn.lab.setting import Setting
from lddyn.lab.shares import verdict

_WANTED = 4.0  # times faster


def make_claim(passes: Row) -> Claim:
    """The pass with shared prompts against the authors' pass, from what `compare` returned."""
    faster, worst = passes["times faster"], max(passes["largest difference"].values())
    each = passes["times faster, each repeat"]
    return Claim(
        "pass",
        "A pass over the probing set with shared prompts is at least 4 times faster than the "
        "authors' with batches of one, and gives the same numbers to 1e-5.",
        "§4.4 of the protocol; our own requirement",
        "no time is published; evaluation must run with batches of one",
        f"{faster:.2f} times faster ({passes['seconds one by one']:.2f} s → "
        f"{passes['seconds shared']:.2f} s of CPU on one thread, the fastest of {len(each)} "
        f"repeats, whose ratios are {min(each):.2f} to {max(each):.2f}; {passes['responses']} "
        f"responses), largest relative difference {worst:.1e}",
        verdict(faster >= _WANTED and worst <= 1e-5),
        f"{passes['tokens one by one'] / passes['tokens shared']:.2f} times fewer tokens are read; "
        "the rest comes from fewer calls, and from a faster BLAS",
        value=faster,
    )


def expected() -> list[str]:
    """What the experiment is to show."""
    return [
        "About a dozen responses for every prompt, from what is learned to noise, and a pass over "
        "them that costs little beside training.",
    ]


def seen(setting: Setting, passes: Row, types: Rows) -> list[str]:
    """What was measured."""
    empty = sum(row["empty"] for row in types)
    worst = max(passes["largest difference"].values())
    return [
        f"{len(setting.probes)} prompts of {setting.title}, {len(types)} response types, {empty} "
        f"responses empty. The training rows and the {len(setting.test)} held-out rows have no "
        "prompt in common.",
        f"The pass with shared prompts took {passes['seconds shared']:.2f} s of CPU, one response "
        f"at a time took {passes['seconds one by one']:.2f} s: {passes['times faster']:.2f} times "
        f"faster, largest relative difference {worst:.1e}.",
    ]
