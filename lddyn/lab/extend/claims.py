"""The claims about SFT on both responses, and how each is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lddyn.lab.curves import Curves, unrelated
from lddyn.lab.record import Claim, Lab, Row, Rows, Verdict
from lddyn.lab.setting import Setting
from lddyn.lab.shares import bootstrap_of, verdict

GATE = (20.0, 0.3)  # sharpness, and the geometric mean probability at which the gate is half open

Runs = Mapping[str, Curves]
After = Mapping[str, Row]


def make_claims(lab: Lab, tuned: Runs, runs: Runs, after: After) -> Iterator[Claim]:
    """All claims of the experiment.

    Args:
        lab: Its generators resample the prompts.
        tuned: The two SFT runs.
        runs: The four DPO runs.
        after: What was measured after each DPO run.
    """
    yield _raised(lab, tuned["y+ only"], tuned["both"])
    yield _slower(lab, runs["y+ only"], runs["both"])
    yield _less_greedy(lab, runs["y+ only"], runs["both"])
    yield _preferred(lab, after)
    yield _degenerate(after)
    yield _gate(lab, runs, after)
    yield _nll(lab, runs, after)


def _raised(lab: Lab, one: Curves, both: Curves) -> Claim:
    raised, interval = bootstrap_of(lab, "raised", both.change("rejected") - one.change("rejected"))
    same, same_interval = bootstrap_of(lab, "same", both.change("chosen") - one.change("chosen"))
    gain = float(np.nanmean(one.change("chosen")))
    return Claim(
        "extend 1",
        "SFT on both raises y− much more, and y+ as much as SFT on y+ does.",
        "§4.3, Fig. 5",
        "y− −97.1 → −60.6, y+ −122.8 → −79.2 (Qwen-1.8B)",
        f"y− {raised:+.2f} nats more, y+ {same:+.2f} (95 %: {same_interval[0]:+.2f} to "
        f"{same_interval[1]:+.2f}); SFT on y+ raises y+ by {gain:+.2f}",
        verdict(interval[0] > 0 and abs(same) < 0.2 * abs(gain)),
        "as much: within a fifth",
        value=raised,
        interval=interval,
    )


def _slower(lab: Lab, base: Curves, extended: Curves) -> Claim:
    slower, interval = bootstrap_of(lab, "slower", unrelated(extended) - unrelated(base))
    return Claim(
        "extend 2",
        "After SFT on both, other responses decay less under the same DPO.",
        "§4.3, Fig. 5",
        "others decay slower",
        f"unrelated {np.nanmean(unrelated(extended)):+.2f} against "
        f"{np.nanmean(unrelated(base)):+.2f} nats",
        verdict(interval[0] > 0),
        "per prompt, same rows in the same order",
        value=slower,
        interval=interval,
    )


def _less_greedy(lab: Lab, base: Curves, extended: Curves) -> Claim:
    ours, theirs = extended.change("chosen", "greedy"), base.change("chosen", "greedy")
    less, interval = bootstrap_of(lab, "less", ours - theirs)
    rises = bootstrap_of(lab, "peak", theirs)[1][0] > 0
    return Claim(
        "extend 3",
        "Greedy confidence rises less.",
        "§4.3, Fig. 5",
        "rises less",
        f"{np.nanmean(ours):+.2f} against {np.nanmean(theirs):+.2f} nats",
        verdict(interval[1] < 0) if rises else "not testable at this scale",
        "greedy confidence along y+'s own prefix; testable only if it rises after SFT on y+ only",
        corrected="the published greedy confidence is that of random words; in a fork's extend run "
        "it stays at about −39",
        value=less,
        interval=interval,
    )


def _preferred(lab: Lab, after: After) -> Claim:
    both, one = (np.array(after[name]["right"]) for name in ("both", "y+ only"))
    better, interval = bootstrap_of(lab, "better", both - one)
    return Claim(
        "extend 4",
        "Its answers are preferred.",
        "§4.3, Table 1",
        "judged win rates 0.65 to 0.69 (ChatGPT), 0.52 to 0.60 (Claude 3) after DPO; one order of "
        "answers only",
        f"no judge here; held-out preference accuracy {both.mean():.2f} against {one.mean():.2f}",
        "not testable at this scale",
        "a win rate needs a judge, and answers good enough to compare; the accuracy of the "
        "implicit reward is another quantity",
        value=better,
        interval=interval,
    )


def _degenerate(after: After) -> Claim:
    one, both = (after[name]["degeneration"] for name in ("y+ only", "both"))
    repeats = [d["after"]["repeated"] - d["before"]["repeated"] for d in (one, both)]
    outcome: Verdict = verdict(repeats[1] < repeats[0])
    if max(map(abs, repeats)) < 0.02:
        outcome = "not testable at this scale"
    return Claim(
        "extend 5",
        "It reduces degenerate answers after DPO.",
        "§4.3; App. F",
        "“reduced degenerate responses”",
        f"the rate of repeated three-word runs changes by {repeats[1]:+.3f} against "
        f"{repeats[0]:+.3f}; distinct pairs of words {both['after']['distinct 2']:.2f} against "
        f"{one['after']['distinct 2']:.2f}",
        outcome,
        "greedy answers to held-out prompts; below a change of 0.02 neither run degenerates",
        value=repeats[1] - repeats[0],
    )


def _remedy(lab: Lab, runs: Runs, after: After, key: str) -> tuple[str, Any, Any]:
    """What a remedy within DPO changes against plain DPO: text, unrelated responses, y+."""
    name = f"y+ only, {key}"
    helped = bootstrap_of(lab, key, unrelated(runs[name]) - unrelated(runs["y+ only"]))
    chosen = [runs[n].change("chosen") for n in (name, "y+ only")]
    saved = bootstrap_of(lab, f"{key} y+", chosen[0] - chosen[1])
    accuracy = [np.mean(after[n]["right"]) for n in (name, "y+ only")]
    text = (
        f"against plain DPO: unrelated {helped[0]:+.2f} nats, y+ {saved[0]:+.2f}; held-out "
        f"accuracy {accuracy[0]:.2f} against {accuracy[1]:.2f}"
    )
    return text, helped, saved


def _gate(lab: Lab, runs: Runs, after: After) -> Claim:
    text, (helped, interval), _ = _remedy(lab, runs, after, "gate")
    return Claim(
        "gate",
        "A gate on y−'s term keeps other responses from falling.",
        "follow-up: Gate-DPO",
        "others −27.6 → −1.4 nats (pythia-410m)",
        text,
        verdict(interval[0] > 0),
        f"σ({GATE[0]:g} (p − {GATE[1]:g})), p the geometric mean of y−'s token probabilities; the "
        "gate also pushes y− less",
        value=helped,
        interval=interval,
    )


def _nll(lab: Lab, runs: Runs, after: After) -> Claim:
    text, _, (saved, interval) = _remedy(lab, runs, after, "NLL")
    return Claim(
        "NLL",
        "The NLL of y+, added to DPO's loss, keeps y+ from falling.",
        "RPO, DPO+NLL",
        "y+ no longer falls",
        text,
        verdict(interval[0] > 0),
        "weight 1, per token of y+",
        value=saved,
        interval=interval,
    )


def expected() -> list[str]:
    """What the paper predicts."""
    return [
        "SFT on both makes y− likelier, so that the same push squeezes less: other responses decay "
        "less, greedy confidence rises less, answers degenerate less.",
    ]


def seen(setting: Setting, rows: Rows) -> list[str]:
    """What was measured."""
    return [
        f"{setting.title}; DPO after SFT on {row['run']}: y+ {row['y+']:+.2f}, y− "
        f"{row['y-']:+.2f}, unrelated {row['unrelated']:+.2f}, greedy {row['greedy']:+.2f} nats; "
        f"{100 * row['squeeze ratio']:.0f} % of the mass that y− lost went to the likeliest other "
        f"token; held-out accuracy {row['held-out accuracy']:.2f}."
        for row in rows
    ]
